"""The command ``fivefold-plan``: mappings for a model and a number of devices. Needs no torch."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from fivefold.parallel_core.commands import run_command
from fivefold.parallel_core.config import load_toml
from fivefold.parallel_core.planner.auto import as_toml, tables
from fivefold.parallel_core.planner.hardware import hardware
from fivefold.parallel_core.planner.jobs import Job
from fivefold.parallel_core.planner.models import ModelShape
from fivefold.parallel_core.planner.nearest import DEGREES
from fivefold.parallel_core.planner.presets import preset
from fivefold.parallel_core.planner.report import as_data, table
from fivefold.parallel_core.planner.search import search

_NAME = "fivefold-plan"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 where a mapping fits, 1 where none does or something is wrong, 2 where the command line
        was wrong.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] == ["calibrate"]:
        chosen = _calibrate_parser().parse_args(words[1:])
        return run_command(f"{_NAME} calibrate", lambda: _calibrate(chosen), debug=chosen.debug)
    options = _parser().parse_args(words)
    return run_command(_NAME, lambda: _plan(options), debug=options.debug)


def _plan(options: argparse.Namespace) -> int:
    machine, job = hardware(options.hardware), _job(options)
    found = search(job, machine)
    if options.toml:
        print(as_toml(tables(found.plans[0].setup)))
    elif options.json:
        print(json.dumps(as_data(found, options.top), indent=2))
    else:
        print(table(job, machine, found, options.top))
    return 0


def _calibrate(options: argparse.Namespace) -> int:
    # Torch is needed for this command alone.
    from fivefold.parallel_core.planner.calibrate import calibrate, write_hardware

    machine = calibrate(options.name or options.file.stem, options.ranks, options.repeats)
    write_hardware(options.file, machine)
    print(options.file.read_text(), end="")
    return 0


def _calibrate_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{_NAME} calibrate",
        description="Measure this machine (products, attention, memory, collectives over ranks of "
        "it) and write it as a TOML file for --hardware.",
    )
    parser.add_argument("file", type=Path, help="the TOML file to write")
    parser.add_argument("--name", help="of the machine in reports; the file's by default")
    parser.add_argument("--ranks", type=_count, default=2, metavar="N", help="for collectives")
    parser.add_argument("--repeats", type=_count, default=5, metavar="N", help="of every timing")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return parser


def _job(options: argparse.Namespace) -> Job:
    return Job(
        model=_model(options.model),
        world_size=options.devices,
        length=options.length,
        global_batch=options.batch,
        microbatches=tuple(options.microbatch),
        recomputes=tuple(options.recompute),
        forms=tuple(options.form),
        most_parts=options.most_stages,
        causal=options.causal,
        **{axis: getattr(options, axis) for axis in DEGREES},
    )


def _model(name: str) -> ModelShape:
    return ModelShape.from_dict(load_toml(Path(name))) if name.endswith(".toml") else preset(name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_NAME,
        description="All legal mappings of a model over a number of devices: those that fit, the "
        "fastest first by estimate, with the memory of the best term by term.",
        epilog=f"`{_NAME} calibrate FILE.toml` measures the machine at hand for --hardware.",
    )
    parser.add_argument("model", help="a preset such as 175B or Mixtral-8x22B, or a TOML file")
    parser.add_argument("--devices", type=_count, required=True, metavar="N", help="in all")
    parser.add_argument("--batch", type=_count, required=True, metavar="N", help="of a step")
    parser.add_argument("--length", type=_count, default=4096, metavar="N", help="of a sequence")
    parser.add_argument("--hardware", default="h100", help="a100, h100, h200, b200, or a TOML file")
    parser.add_argument("--microbatch", type=_count, nargs="+", default=[1, 2], metavar="N")
    ways = ("none", "selective", "full")
    parser.add_argument("--recompute", nargs="+", choices=ways, default=list(ways))
    forms = ("replicate", "zero1", "zero2", "zero3")
    parser.add_argument("--form", nargs="+", choices=forms, default=["zero1"])
    parser.add_argument("--most-stages", type=_count, default=4, metavar="N", help="on each rank")
    for axis in DEGREES:
        parser.add_argument(f"--{axis}", type=_count, metavar="N", help=f"only this size of {axis}")
    parser.add_argument("--causal", action="store_true", help="count half of attention's FLOPs")
    parser.add_argument("--top", type=_count, default=5, metavar="N", help="plans to show")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument("--toml", action="store_true", help="the best as tables of a run's file")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
