"""The command ``fivefold-hybrid-ssm``; torch is imported only once there is something to run."""

import argparse
import sys
from collections.abc import Sequence

from fivefold.hybrid_ssm.compress import command as compress
from fivefold.hybrid_ssm.errors import HybridError
from fivefold.parallel_core.arguments import (
    DTYPES,
    add_debug,
    add_export,
    add_generate,
    add_train,
    command_parser,
)
from fivefold.parallel_core.commands import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 where all went well, 1 where it failed, 2 where the command line was wrong, 130 where
        it was interrupted.
    """
    options = _parser().parse_args(arguments)
    return run_command(
        "fivefold-hybrid-ssm", lambda: _run(options), expected=(HybridError,), debug=options.debug
    )


def _run(options: argparse.Namespace) -> int:
    from fivefold.hybrid_ssm import commands

    run = {
        "train": commands.train,
        "export": commands.export,
        "generate": commands.generate,
        "compress": compress.run,
    }
    return run[options.command](options)


def _parser() -> argparse.ArgumentParser:
    parser, commands = command_parser(
        "fivefold-hybrid-ssm",
        "Train, export, run and compress hybrids of Mamba-2, attention, MLP and expert layers.",
    )
    train = commands.add_parser("train", help="train a model, or go on with a run")
    add_train(train, module="fivefold.hybrid_ssm", default_run="runs/hybrid")
    add_export(commands.add_parser("export", help="write a run's model in Hugging Face form"))
    _add_generate(commands.add_parser("generate", help="continue a text"))
    compress.add_arguments(commands.add_parser("compress", help="make a smaller model of a model"))
    add_debug(commands.choices.values())
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Continue a text with a model in Hugging Face form, on this machine; the text goes to "
        "standard output as it comes, and its speed to standard error."
    )
    add_generate(parser, model="a Nemotron-H or Mamba-2")
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="above 1 makes tokens that were there less likely",
    )
    parser.add_argument(
        "--prefill-chunk-size",
        type=int,
        default=2048,
        metavar="N",
        help="prompt tokens read at once (default: %(default)s)",
    )
    parser.add_argument(
        "--stop", action="append", metavar="TEXT", help="end at this text; may be given repeatedly"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: what the files say")
    parser.add_argument("--device", help="for example cuda (default: the CPU)", metavar="DEVICE")


if __name__ == "__main__":
    sys.exit(main())
