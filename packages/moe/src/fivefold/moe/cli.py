"""The command ``fivefold-moe``; torch is imported only once there is something to run."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

from fivefold.moe.errors import MoEError
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
    parser = argparse.ArgumentParser(
        prog="fivefold-moe",
        description="Train, export and run mixture-of-experts language models under folded "
        "five-dimensional parallelism.",
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {version('fivefold-moe')}"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands.add_parser("train", help="train a model, or go on with a run"))
    _add_export(commands.add_parser("export", help="write a run's model in Hugging Face form"))
    _add_generate(commands.add_parser("generate", help="continue a text"))
    _add_upcycle(commands.add_parser("upcycle", help="make experts of a dense model"))
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train on the text and layout of a TOML file. Run it again after Ctrl-C, a crash or with "
        "another layout, and it goes on from the newest checkpoint. On one machine --nproc forks "
        "the ranks; under torchrun the ranks are torchrun's: torchrun --nproc-per-node 8 "
        "-m fivefold.moe train --config run.toml --run-folder runs/mine"
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="TOML file of the run")
    # torchrun looks at the arguments of its script too, and takes --run for an abbreviation of its
    # own --run-path.
    parser.add_argument(
        "--run",
        "--run-folder",
        default="runs/moe",
        metavar="FOLDER",
        help="folder of the run (default: %(default)s); under torchrun only the long name works",
    )
    parser.add_argument("--nproc", type=int, metavar="N", help="ranks to fork (default: 1)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="override a value of the file, e.g. --set training.steps=100",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the layout, train nothing"
    )
    parser.add_argument("--tensorboard", action="store_true", help="write TensorBoard events too")


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write a run's newest checkpoint as a model that transformers loads."
    parser.add_argument("--run", required=True, metavar="FOLDER", help="folder of the run")
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="where to write the model"
    )
    parser.add_argument(
        "--step", type=int, metavar="N", help="the checkpoint after N steps (default: the newest)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: what the run trains in)",
    )
    parser.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="largest size of one safetensors file (default: %(default)s)",
    )


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.description = "Continue a text with a model in Hugging Face form, on this machine."
    parser.add_argument(
        "--model",
        required=True,
        metavar="FOLDER_OR_REPO",
        help="what export wrote, or a Mixtral of the Hugging Face Hub",
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=200,
        metavar="N",
        help="tokens to add at most (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="T",
        help="0 takes the likeliest token (default: %(default)s)",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the likeliest tokens that make up P"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the draws (default: %(default)s)"
    )


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
