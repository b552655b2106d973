"""``python -m fivefold.moe``: what ``torchrun -m`` starts."""

import sys

from fivefold.moe.cli import main

sys.exit(main())
