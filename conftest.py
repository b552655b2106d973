"""Settings of the whole test run.

Triton looks at ``TRITON_INTERPRET`` once, when it is imported, and libraries that tests of other
packages use import it: this has to come before them all.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
