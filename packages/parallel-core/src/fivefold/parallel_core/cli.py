"""The command ``fivefold-parallel-core``; torch is imported only once there is something to run."""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

from fivefold.parallel_core.commands import run_command
from fivefold.parallel_core.layout import DEFAULT_ORDER

_NAME = "fivefold-parallel-core"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 where all went well, 1 where it failed, 2 where the command line or the layout was wrong,
        130 where it was interrupted.
    """
    options = _parser().parse_args(arguments)
    return run_command(_NAME, lambda: options.run(options), debug=options.debug)


def _env(options: argparse.Namespace) -> int:
    import json

    from fivefold.parallel_core.env import environment, table

    found = environment()
    print(json.dumps(found, indent=2) if options.json else table(found))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from fivefold.parallel_core.doctor.command import doctor

    return doctor(_NAME, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_NAME,
        description="Look at the machine that a parallel job is to run on, and examine the "
        "collectives that it is to use.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version(_NAME)}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_env(commands.add_parser("env", help="versions, devices, backends, variables of the rank"))
    _add_doctor(commands.add_parser("doctor", help="run every collective on every group"))
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return parser


def _add_env(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Versions of what is installed, devices, memory, and what torchrun has set. Starts nothing."
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=_env)


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run every collective that this package uses on every group of a layout, in float32, "
        "bfloat16 and int64; compare each result with what it must be, and time it. What is wrong, "
        "fails or hangs is named with its axis and ranks. On one machine the ranks are forked; "
        "under torchrun they are torchrun's: torchrun --nproc-per-node 8 -m fivefold.parallel_core "
        "doctor --tp 4"
    )
    parser.add_argument(
        "--nproc",
        type=int,
        metavar="N",
        help="ranks to fork (default: as few as the layout allows, at least 2)",
    )
    for axis, meaning in _AXES.items():
        parser.add_argument(
            f"--{axis}", type=int, default=1, metavar="N", help=f"{meaning} size (default: 1)"
        )
    parser.add_argument(
        "--order",
        default=DEFAULT_ORDER,
        help="axes from the fastest rank stride to the slowest (default: %(default)s)",
    )
    _add_measuring(parser)
    parser.set_defaults(run=_doctor)


_AXES = {
    "tp": "tensor-parallel",
    "cp": "context-parallel",
    "pp": "pipeline-parallel",
    "ep": "expert-parallel",
    "etp": "expert-tensor-parallel",
}


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bytes",
        type=_positive(int),
        default=1 << 20,
        metavar="N",
        help="of the whole tensor of each collective (default: %(default)s)",
    )
    parser.add_argument(
        "--repeats",
        type=_positive(int),
        default=5,
        metavar="N",
        help="timed calls of each (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=_positive(float),
        default=60.0,
        metavar="SECONDS",
        help="after which one check is said to hang (default: %(default)g)",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="of the tensors (default: cuda under torchrun where there is a GPU, else cpu)",
    )
    parser.add_argument("--json", metavar="FILE", help="write all that was found to a file too")


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
        return value

    read.__name__ = kind.__name__  # argparse's messages name it
    return read


if __name__ == "__main__":
    sys.exit(main())
