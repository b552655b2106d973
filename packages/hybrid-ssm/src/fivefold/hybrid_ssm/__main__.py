"""``python -m fivefold.hybrid_ssm``: what ``torchrun -m`` starts."""

import sys

from fivefold.hybrid_ssm.cli import main

sys.exit(main())
