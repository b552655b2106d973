"""``python -m fivefold.parallel_core``: what ``torchrun -m`` starts."""

import sys

from fivefold.parallel_core.cli import main

sys.exit(main())
