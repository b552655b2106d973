"""What the commands' arguments have in common. Imports nothing heavy."""

import argparse

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130
"""Exit statuses after an error, a wrong command line (argparse's too) and Ctrl-C."""


def add_ops(parser: argparse.ArgumentParser) -> None:
    """Add the names of ops, as ``selection.select`` takes them."""
    parser.add_argument(
        "ops",
        nargs="*",
        metavar="OP",
        help="rms_norm, or moe/permute for another package's (default: all ops)",
    )


def count(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"needs a whole number from 1 on, found {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """A time above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"needs a number of seconds above 0, found {text!r}")
    return value
