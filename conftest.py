"""Settings of the whole test run."""

import os
import signal

# Before torch is imported: many ranks share few cores here, and threads of OpenMP that wait for
# each other there take thirty times as long as one thread does.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Triton looks at TRITON_INTERPRET once, when it is imported, and libraries that tests of other
# packages use import it: this has to come before them all.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A job that a shell runs in the background ignores Ctrl-C, and there are tests of what it does.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
