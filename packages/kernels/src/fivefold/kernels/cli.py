"""The command ``fivefold-kernels``; torch is imported only once there is something to run."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

from fivefold.kernels.arguments import FAILED, INTERRUPTED, WRONG_USAGE, add_ops
from fivefold.kernels.bench.command import add_arguments as add_bench
from fivefold.kernels.errors import KernelError, KernelInputError
from fivefold.kernels.offline.command import add_arguments as add_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 where all went well, 1 where it failed, 2 where the command line was wrong, 130 where
        it was interrupted.
    """
    options = _parser().parse_args(arguments)
    try:
        return _command(options.command)(options)
    except KeyboardInterrupt:
        print("fivefold-kernels: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # who reads along has seen enough; Python may not write at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KernelError, OSError, ImportError) as error:
        if options.debug:
            raise
        print(f"fivefold-kernels: error: {error}", file=sys.stderr)
        return WRONG_USAGE if isinstance(error, KernelInputError) else FAILED


def _command(name: str) -> Callable[[argparse.Namespace], int]:
    if name == "bench":
        from fivefold.kernels.bench.command import run
    elif name == "report":
        from fivefold.kernels.offline.command import run
    else:
        from fivefold.kernels.commands import which as run
    return run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fivefold-kernels",
        description="Say what runs an op here, look at the kernels' machine code without a GPU, "
        "and measure ops against their peers.",
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {version('fivefold-kernels')}"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_which(commands.add_parser("which", help="say which backend runs an op, and why"))
    add_report(commands.add_parser("report", help="compile all kernels and look at the code"))
    add_bench(commands.add_parser("bench", help="measure ops against their peers"))
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return parser


def _add_which(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "For tensors on the CPU and on a CUDA device, print the backend that runs each part of an "
        "op, and of every other backend why it does not."
    )
    add_ops(parser)


if __name__ == "__main__":
    sys.exit(main())
