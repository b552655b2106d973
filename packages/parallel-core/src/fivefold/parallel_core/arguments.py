"""The arguments that the commands of these packages share; nothing here needs torch.

The verbs ``train``, ``export`` and ``generate`` take the same options in every package
and may take more.
"""

import argparse
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

from fivefold.parallel_core.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16")
"""Names that ``--dtype`` takes."""


def command_parser(prog: str, description: str) -> tuple[argparse.ArgumentParser, Any]:
    """A parser with ``--version`` and room for verbs.

    Args:
        prog: name of the command, and of the distribution whose version it tells.
        description: for ``--help``.

    Returns:
        The parser, and the action whose ``add_parser`` adds a verb; ``options.command`` names it.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--version", action="version", version=f"%(prog)s {version(prog)}")
    return parser, parser.add_subparsers(dest="command", required=True, metavar="COMMAND")


def add_debug(parsers: Iterable[argparse.ArgumentParser]) -> None:
    """Give every verb ``--debug``."""
    for parser in parsers:
        parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")


def add_train(parser: argparse.ArgumentParser, *, module: str, default_run: str) -> None:
    """What ``train`` takes; ``training.command`` does it.

    Args:
        parser: of the verb.
        module: what torchrun starts with ``-m``.
        default_run: folder of a run that is given none.
    """
    parser.description = (
        "Train on the text and layout of a TOML file. Run it again after Ctrl-C, a crash or with "
        "another layout, and it goes on from the newest checkpoint. On one machine --nproc forks "
        "the ranks; under torchrun the ranks are torchrun's: torchrun --nproc-per-node 8 "
        f"-m {module} train --config run.toml --run-folder runs/mine"
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="TOML file of the run")
    # torchrun looks at the arguments of its script too, and takes --run for an abbreviation of its
    # own --run-path.
    parser.add_argument(
        "--run",
        "--run-folder",
        default=default_run,
        metavar="FOLDER",
        help="folder of the run (default: %(default)s); under torchrun only the long name works",
    )
    parser.add_argument("--nproc", type=int, metavar="N", help="ranks to fork (default: 1)")
    add_overrides(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the layout, train nothing"
    )
    parser.add_argument("--tensorboard", action="store_true", help="write TensorBoard events too")


def add_overrides(parser: argparse.ArgumentParser, file: str = "the file") -> None:
    """``--set KEY=VALUE``, as often as one likes; ``overrides_of`` reads ``options.overrides``."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help=f"override a value of {file}, e.g. --set training.steps=100",
    )


def overrides_of(pairs: Iterable[str]) -> dict[str, str]:
    """``["a.b=1"]`` as ``{"a.b": "1"}``.

    Raises:
        ConfigError: a pair without a key or without "=".
    """
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise ConfigError(f"--set {pair!r}; write KEY=VALUE, e.g. --set training.steps=100")
        found[key] = value
    return found


def add_export(parser: argparse.ArgumentParser) -> None:
    """What ``export`` takes; ``training.run_export`` does it."""
    parser.description = "Write a run's newest checkpoint as a model that transformers loads."
    parser.add_argument("--run", required=True, metavar="FOLDER", help="folder of the run")
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="where to write the model"
    )
    parser.add_argument(
        "--step", type=int, metavar="N", help="the checkpoint after N steps (default: the newest)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights (default: what the run trains in)"
    )
    parser.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="largest size of one safetensors file (default: %(default)s)",
    )


def add_generate(parser: argparse.ArgumentParser, *, model: str) -> None:
    """What ``generate`` takes of a model, a prompt and how tokens are drawn.

    Args:
        parser: of the verb.
        model: which repositories of the Hub it takes, for ``--help``.
    """
    parser.add_argument(
        "--model",
        required=True,
        metavar="FOLDER_OR_REPO",
        help=f"what export wrote, or {model} of the Hugging Face Hub",
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue")
    numbers: list[tuple[str, type, object, str, str]] = [
        ("max-new-tokens", int, 200, "N", "tokens to add at most (default: %(default)s)"),
        ("temperature", float, 0.8, "T", "0 takes the likeliest token (default: %(default)s)"),
        ("top-k", int, None, "K", "draw from the K likeliest tokens"),
        ("top-p", float, None, "P", "draw from the likeliest tokens that make up P"),
        ("seed", int, 0, "N", "of the draws (default: %(default)s)"),
    ]
    for name, kind, default, metavar, text in numbers:
        parser.add_argument(f"--{name}", type=kind, default=default, metavar=metavar, help=text)


def check_temperature(temperature: float) -> None:
    """Check ``--temperature``; raises ``ConfigError`` below 0."""
    if temperature < 0:
        raise ConfigError(f"--temperature {temperature}: it must be at least 0")
