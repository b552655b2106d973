"""The commands ``train`` and ``export``: their options, and what they do."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fivefold.fold.errors import FoldConfigError, FoldError
from fivefold.parallel_core import arguments

if TYPE_CHECKING:
    from fivefold.fold.training.config import RunConfig
    from fivefold.parallel_core.layout import Layout


def add_train(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``train``."""
    arguments.add_train(parser, module="fivefold.fold", default_run="runs/fold")
    parser.description = (parser.description or "").replace(
        "Train on the text and layout of", "Train on the structures of"
    )
    parser.add_argument(
        "--dap",
        type=int,
        metavar="N",
        help="neighbouring ranks that share a sample; a divisor of their number (default: the "
        "file's training.dap, or 1)",
    )


def add_export(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``export``."""
    parser.description = (
        "Write the network of a run, or of any file of parameters, in the form of another program."
    )
    parser.add_argument("--run", metavar="FOLDER", help="of a run")
    parser.add_argument("--params", metavar="PATH", help="what predict takes as --params")
    parser.add_argument(
        "--style",
        choices=("fivefold", "alphafold", "openfold", "mlperf", "scalefold"),
        default="fivefold",
        help="whose names (default: %(default)s, a folder of safetensors)",
    )
    parser.add_argument("--output", required=True, metavar="PATH", help="folder or file to write")
    parser.add_argument("--step", type=int, metavar="N", help="of the checkpoint (default: newest)")
    parser.add_argument(
        "--raw", action="store_true", help="the parameters, not their moving average"
    )


def run_train(options: argparse.Namespace) -> int:
    """Train, and write the network into the run's folder; the exit status."""
    from fivefold.fold.training import run
    from fivefold.fold.training.config import load_run
    from fivefold.parallel_core.launcher import place, under_torchrun
    from fivefold.parallel_core.training.command import TrainCommand

    if options.dap is not None:
        options.overrides = [*options.overrides, f"training.dap={options.dap}"]
    train = TrainCommand(
        load=load_run,
        check=run.check,
        describe=_describe,
        train_rank=run.train_rank,
        expected=(FoldError,),
    )
    status = train(options)
    if status == 0 and not options.dry_run and (not under_torchrun() or place()[0] == 0):
        folder = Path(options.run) / run.MODEL
        run.load_run_model(Path(options.run))[0].save_pretrained(folder)
        print(f"the network is in {folder}: fivefold-fold predict --params {folder}")
    return status


def _describe(config: "RunConfig", layout: "Layout") -> None:
    """Prepare the data; print what is left out by name, learned from and scored on."""
    from fivefold.fold.training.run import prepare_data, split_of

    found = prepare_data(config)
    for each in found.dropped if found else ():
        print(f"left out {each['name']}: {each['reason']}")
    for each in found.notes if found else ():
        print(f"{each['name']}: {each['note']}")
    split = split_of(config)
    shared = f", {layout.tp} to a sample" if layout.tp > 1 else ""
    kind = "of them" if config.evaluation.on_training_chains else "held-out ones"
    print(
        f"{len(split.train)} chains of {config.data.prepared} to learn from, {len(split.heldout)} "
        f"{kind} to score, {layout.world_size} ranks{shared}",
        flush=True,
    )


def run_export(options: argparse.Namespace) -> int:
    """Export; the exit status."""
    from fivefold.fold.model.alphafold import AlphaFold
    from fivefold.fold.training.run import load_run_model

    if (options.run is None) == (options.params is None):
        raise FoldConfigError("export needs --run FOLDER or --params PATH, one of them")
    if options.run is not None:
        model, step = load_run_model(Path(options.run), options.step, average=not options.raw)
        print(f"the network after step {step}")
    else:
        model = AlphaFold.from_pretrained(options.params)
    if options.style == "fivefold":
        model.save_pretrained(options.output)
    else:
        model.export(options.output, options.style)
    print(f"wrote {options.output}")
    return 0
