"""The command ``fivefold-fold``; torch is imported only once there is something to run."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

from fivefold.fold.data.command import add_prepare, run_prepare
from fivefold.fold.errors import FoldError
from fivefold.fold.predicting.command import (
    add_evaluate,
    add_predict,
    run_evaluate,
    run_predict,
)
from fivefold.fold.training.command import add_export, add_train, run_export, run_train
from fivefold.parallel_core.commands import run_command

_VERBS = {
    "prepare": (add_prepare, run_prepare, "read structures and alignments into shards"),
    "train": (add_train, run_train, "train a network, or go on with a run"),
    "predict": (add_predict, run_predict, "predict structures"),
    "evaluate": (add_evaluate, run_evaluate, "score predictions by known structures"),
    "export": (add_export, run_export, "write a network in the form of another program"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 where all went well, 1 where it failed, 2 where the command line was wrong, 130 where
        it was interrupted.
    """
    options = _parser().parse_args(arguments)
    _, run, _ = _VERBS[options.command]
    return run_command(
        "fivefold-fold", lambda: run(options), expected=(FoldError,), debug=options.debug
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fivefold-fold",
        description="Prepare data for AlphaFold 2, train it, and predict structures.",
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {version('fivefold-fold')}"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add, _, text) in _VERBS.items():
        command = commands.add_parser(name, help=text)
        add(command)
        command.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return parser


if __name__ == "__main__":
    sys.exit(main())
