"""The command ``fivefold-hybrid-ssm``; torch is imported only once there is something to run."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

from fivefold.hybrid_ssm.errors import HybridError
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

    run = {"train": commands.train, "export": commands.export, "generate": commands.generate}
    return run[options.command](options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fivefold-hybrid-ssm",
        description="Train, export and run hybrids of Mamba-2, attention, MLP and expert layers.",
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {version('fivefold-hybrid-ssm')}"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands.add_parser("train", help="train a model, or go on with a run"))
    _add_export(commands.add_parser("export", help="write a run's model in Hugging Face form"))
    _add_generate(commands.add_parser("generate", help="continue a text"))
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train on the text and layout of a TOML file. Run it again after Ctrl-C, a crash or with "
        "another layout, and it goes on from the newest checkpoint. On one machine --nproc forks "
        "the ranks; under torchrun the ranks are torchrun's: torchrun --nproc-per-node 8 "
        "-m fivefold.hybrid_ssm train --config run.toml --run-folder runs/mine"
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="TOML file of the run")
    # torchrun looks at the arguments of its script too, and takes --run for an abbreviation of its
    # own --run-path.
    parser.add_argument(
        "--run",
        "--run-folder",
        default="runs/hybrid",
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
    parser.description = (
        "Continue a text with a model in Hugging Face form, on this machine; the text goes to "
        "standard output as it comes, and its speed to standard error."
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="FOLDER_OR_REPO",
        help="what export wrote, or a Nemotron-H or Mamba-2 of the Hugging Face Hub",
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue")
    numbers: list[tuple[str, type, object, str, str]] = [
        ("max-new-tokens", int, 200, "N", "tokens to add at most (default: %(default)s)"),
        ("temperature", float, 0.8, "T", "0 takes the likeliest token (default: %(default)s)"),
        ("top-k", int, None, "K", "draw from the K likeliest tokens"),
        ("top-p", float, None, "P", "draw from the likeliest tokens that make up P"),
        ("repetition-penalty", float, 1.0, "R", "above 1 makes tokens that were there less likely"),
        ("seed", int, 0, "N", "of the draws (default: %(default)s)"),
        ("prefill-chunk-size", int, 2048, "N", "prompt tokens read at once (default: %(default)s)"),
    ]
    for name, kind, default, metavar, text in numbers:
        parser.add_argument(f"--{name}", type=kind, default=default, metavar=metavar, help=text)
    parser.add_argument(
        "--stop", action="append", metavar="TEXT", help="end at this text; may be given repeatedly"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: what the files say"
    )
    parser.add_argument("--device", help="for example cuda (default: the CPU)", metavar="DEVICE")


if __name__ == "__main__":
    sys.exit(main())
