"""The command ``fivefold-moe``; torch is imported only once there is something to run."""

import argparse
import sys
from collections.abc import Sequence

from fivefold.moe.errors import MoEError
from fivefold.parallel_core.arguments import (
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
        "fivefold-moe", lambda: _run(options), expected=(MoEError,), debug=options.debug
    )


def _run(options: argparse.Namespace) -> int:
    from fivefold.moe import commands

    run = {
        "train": commands.train,
        "export": commands.export,
        "generate": commands.generate,
        "upcycle": commands.upcycle,
    }
    return run[options.command](options)


def _parser() -> argparse.ArgumentParser:
    parser, commands = command_parser(
        "fivefold-moe",
        "Train, export and run mixture-of-experts language models under folded five-dimensional "
        "parallelism.",
    )
    train = commands.add_parser("train", help="train a model, or go on with a run")
    add_train(train, module="fivefold.moe", default_run="runs/moe")
    train.add_argument(
        "--plan",
        choices=("auto",),
        help="train under the mapping that fivefold-plan finds fastest, instead of the file's",
    )
    train.add_argument(
        "--machine",
        default="h100",
        metavar="NAME",
        help="what the plan is for: a100, h100, h200, b200 or a TOML file (default: %(default)s)",
    )
    add_export(commands.add_parser("export", help="write a run's model in Hugging Face form"))
    generate = commands.add_parser("generate", help="continue a text")
    generate.description = "Continue a text with a model in Hugging Face form, on this machine."
    add_generate(generate, model="a Mixtral")
    _add_upcycle(commands.add_parser("upcycle", help="make experts of a dense model"))
    add_debug(commands.choices.values())
    return parser


def _add_upcycle(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Make a mixture of experts of a dense model (Llama, Mistral, Qwen2 or Qwen3) in Hugging "
        "Face form. It starts as the same function; train it from there."
    )
    parser.add_argument("--model", required=True, metavar="FOLDER_OR_REPO", help="the dense model")
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="where to write the mixture"
    )
    parser.add_argument(
        "--copies",
        type=int,
        default=8,
        metavar="C",
        help="of each layer's network (default: %(default)s)",
    )
    parser.add_argument(
        "--copies-per-token",
        type=int,
        default=2,
        metavar="K",
        help="that a token uses (default: %(default)s)",
    )
    parser.add_argument(
        "--granularity",
        type=int,
        default=1,
        metavar="G",
        help="slices of a copy, each an expert of its own (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the routers (default: %(default)s)"
    )


if __name__ == "__main__":
    sys.exit(main())
