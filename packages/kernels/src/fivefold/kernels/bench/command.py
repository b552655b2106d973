"""The verb ``bench``; torch is imported only once there is something to run."""

import argparse
import sys
from pathlib import Path

from fivefold.kernels.arguments import INTERRUPTED, WRONG_USAGE, add_ops, count, seconds

DTYPES = ("float64", "float32", "float16", "bfloat16")
DEVICES = ("cpu", "cuda")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what ``run`` reads."""
    parser.description = (
        "Time ops against torch eager, torch.compile and other libraries, forward and backward, "
        "in one interleaved run, with the roofline floor beside each. A contender whose results "
        "or gradients differ is reported and not timed."
    )
    add_ops(parser)
    parser.add_argument("--device", metavar="cpu|cuda", help="default: cuda where there is one")
    parser.add_argument(
        "--dtype",
        metavar="DTYPE[,DTYPE]",
        help=f"of {', '.join(DTYPES)} (default: float32 on a CPU, what models use on a GPU)",
    )
    parser.add_argument(
        "--only",
        choices=("forward", "backward", "both"),
        default="both",
        help="what to time; backward means forward and backward together",
    )
    parser.add_argument(
        "--backends",
        choices=("auto", "all"),
        default="auto",
        help="time the backend that is chosen unasked, or every one that this machine has",
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--threads", type=count, default=1, metavar="N", help="of a CPU")
    parser.add_argument(
        "--repeats", type=count, default=100, metavar="N", help="rounds of a case, at most"
    )
    parser.add_argument(
        "--seconds", type=seconds, default=1.0, metavar="S", help="for the rounds of a case"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times there as well")


def run(options: argparse.Namespace) -> int:
    """Measure and print; writes the file after each case.

    Returns:
        0 where all went well, 1 where an op of ours failed, 2 where a name was wrong, 130 where it
        was interrupted.
    """
    from fivefold.kernels.bench.session import Session, settings_of
    from fivefold.kernels.errors import KernelInputError

    try:
        session = Session(settings_of(options), options.ops, say=_say)
    except KernelInputError as error:
        sys.stderr.write(f"fivefold-kernels bench: error: {error}\n")
        return WRONG_USAGE
    try:
        session.run()
    except KeyboardInterrupt:
        session.interrupted()
        return INTERRUPTED
    return 1 if session.failed else 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
