"""``python -m fivefold.fold`` is the command ``fivefold-fold``."""

import sys

from fivefold.fold.cli import main

sys.exit(main())
