"""The command ``fivefold-moe``; torch is imported only once there is something to run."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 where all went well, 1 where it failed, 2 where the command line was wrong, 130 where
        it was interrupted.
    """
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except KeyboardInterrupt:
        print("fivefold-moe: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if options.debug or not _is_expected(error):
            raise
        print(f"fivefold-moe: error: {error}", file=sys.stderr)
        return 1


def _is_expected(error: Exception) -> bool:
    from fivefold.moe.errors import MoEError
    from fivefold.parallel_core.errors import ParallelError

    return isinstance(error, (MoEError, ParallelError, ImportError))


def _run(options: argparse.Namespace) -> int:
    from fivefold.moe import commands

    run = {"train": commands.train, "export": commands.export, "generate": commands.generate}
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
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train on the text and layout of a TOML file. Run it again after Ctrl-C, a crash or with "
        "another layout, and it goes on from the newest checkpoint. On one machine --nproc forks "
        "the ranks; under torchrun the ranks are torchrun's: "
        "torchrun --nproc-per-node 8 -m fivefold.moe train --config run.toml"
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="TOML file of the run")
    parser.add_argument(
        "--run",
        default="runs/moe",
        metavar="FOLDER",
        help="folder of the run (default: %(default)s)",
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
    parser.add_argument("--step", type=int, help="a checkpoint other than the newest")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: that of the run"
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", help="of one safetensors file (default: %(default)s)"
    )


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.description = "Continue a text with a model in Hugging Face form, on this machine."
    parser.add_argument("--model", required=True, metavar="FOLDER_OR_REPO")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="0 takes the likeliest (default: %(default)s)",
    )
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--seed", type=int, default=0)


if __name__ == "__main__":
    sys.exit(main())
