"""``python -m fivefold.sparse_rnn`` is the command ``fivefold-sparse-rnn``."""

import sys

from fivefold.sparse_rnn.cli import main

sys.exit(main())
