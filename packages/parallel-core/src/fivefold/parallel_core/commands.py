"""How the commands of these packages end: a status for the shell, and an error as one line."""

import sys
from collections.abc import Callable

from fivefold.parallel_core.errors import EXPECTED, RankError

FAILED, INTERRUPTED = 1, 130
"""Exit statuses after an error and after Ctrl-C; 2 is argparse's for a wrong command line."""


def run_command(
    name: str,
    command: Callable[[], int],
    *,
    expected: tuple[type[Exception], ...] = (),
    debug: bool = False,
) -> int:
    """Run a command, and if it fails as can be expected say why in one line.

    Args:
        name: of the program, for messages.
        command: does the work and returns the exit status.
        expected: errors besides ``EXPECTED`` whose message says all that a user needs to know.
        debug: let these errors through too, so that Python shows their tracebacks.

    Returns:
        The exit status.
    """
    try:
        return command()
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (*EXPECTED, *expected) as error:
        if debug:
            raise
        text = error.summary if isinstance(error, RankError) else error
        print(f"{name}: error: {text}", file=sys.stderr)
        return FAILED
