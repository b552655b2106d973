"""The verb ``compress`` of ``fivefold-hybrid-ssm``; importing it imports no torch."""

import argparse
from pathlib import Path
from typing import Any

from fivefold.parallel_core.commands import INTERRUPTED
from fivefold.parallel_core.config import load_toml, override
from fivefold.parallel_core.errors import ConfigError

SECTIONS = ("data", "importance", "memory", "search", "distill")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb."""
    parser.description = (
        "Make a smaller model that needs at most a budget of memory: score layers and neurons, "
        "rank every candidate, distill the best from the model. Run the same command again after "
        "a kill and it goes on."
    )
    parser.add_argument(
        "--model", required=True, metavar="FOLDER_OR_REPO", help="in Hugging Face form"
    )
    parser.add_argument(
        "--budget",
        required=True,
        metavar="SIZE",
        help='memory for inference: "31.7GiB", or a share of the model\'s such as "80%%"',
    )
    parser.add_argument(
        "--output",
        default="runs/compressed",
        metavar="FOLDER",
        help="tables, plots, checkpoints and the result (default: %(default)s)",
    )
    parser.add_argument(
        "--config", metavar="FILE", help=f"TOML file with sections {', '.join(SECTIONS)}"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="override a value, e.g. --set memory.context_length=8192",
    )
    parser.add_argument(
        "--nproc", type=int, default=1, metavar="N", help="ranks of distillation (default: 1)"
    )
    parser.add_argument(
        "--lm-eval",
        metavar="TASKS",
        help="choose by the mean accuracy on tasks of lm-evaluation-harness, joined by commas",
    )


def run(options: argparse.Namespace) -> int:
    """Compress; the exit status."""
    from fivefold.hybrid_ssm.compress.config import CompressConfig
    from fivefold.hybrid_ssm.compress.lm_eval import harness
    from fivefold.hybrid_ssm.compress.pipeline import Stopped, minipuzzle

    raw: dict[str, Any] = dict(load_toml(Path(options.config))) if options.config else {}
    raw["budget"] = options.budget
    config = override(CompressConfig.from_dict(raw), _overrides(options.overrides))
    benchmark = harness(options.lm_eval.split(",")) if options.lm_eval else None
    try:
        folder = minipuzzle(
            options.model,
            options.output,
            config,
            benchmark=benchmark,
            nproc=options.nproc,
            tell=lambda text: print(text, flush=True),
        )
    except Stopped as stopped:
        print(f"{stopped}; run the same command again to go on")
        return INTERRUPTED
    print(f"wrote {folder}")
    return 0


def _overrides(pairs: list[str]) -> dict[str, str]:
    split = [pair.partition("=") for pair in pairs]
    for (key, equals, _), pair in zip(split, pairs, strict=True):
        if not key or not equals:
            raise ConfigError(f"--set {pair!r}; write KEY=VALUE, e.g. --set search.num_finalists=1")
    return {key: value for key, _, value in split}
