"""``python -m fivefold.kernels``: the command where its script is not on the path."""

import sys

from fivefold.kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
