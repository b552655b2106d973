"""A training run: from its configuration to checkpoints and a network."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch

from fivefold.fold import sharding
from fivefold.fold.data.dataset import Chains
from fivefold.fold.data.prepare import Found, prepare
from fivefold.fold.model.alphafold import AlphaFold
from fivefold.fold.training.config import RunConfig
from fivefold.fold.training.report import FoldReport
from fivefold.fold.training.samples import (
    Split,
    StepSamples,
    split_chains,
    training_samples,
)
from fivefold.fold.training.trainer import FoldTrainer
from fivefold.parallel_core.build import ParallelModel
from fivefold.parallel_core.checkpoint import Checkpoints, TensorPart, load_parts, read_state
from fivefold.parallel_core.files import write_json
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.parameters import ParameterTable
from fivefold.parallel_core.plan import parallelize
from fivefold.parallel_core.regions import check_regions
from fivefold.parallel_core.topology import Topology
from fivefold.parallel_core.training.ends import Outcome
from fivefold.parallel_core.training.run import CHECKPOINTS, RUN_FILE, LayoutConfig
from fivefold.parallel_core.training.run_export import checkpoint_of, read_run
from fivefold.parallel_core.training.run_rank import topology_of
from fivefold.parallel_core.training.totals import Totals

MODEL = "model"
"""Folder of a run where its network is, for ``AlphaFold.from_pretrained``."""

# What may change when a run goes on: how it is trained, but not what it learns from or what it is.
_OF_DATA = ("prepared", "chains", "heldout", "heldout_fraction", "sampling", "clusters")


def check(config: RunConfig, world_size: int) -> Layout:
    """Check what can be checked before ranks are started.

    Raises:
        LayoutError: no such number of ranks.
        ConfigError: the batch, the ranks that share a sample or the regions to recompute do not
            fit.
    """
    layout = config.training.layout(world_size)
    config.training.samples_per_rank(layout)
    config.training.data_parallel.check(layout)
    with torch.device("meta"):
        check_regions(AlphaFold(config.model), config.training.recompute)
    return layout


def prepare_data(config: RunConfig) -> Found | None:
    """Prepare the run's structures where there are some, or None where that was done before.

    Raises:
        FoldDataError: there is nothing to prepare or to learn from.
    """
    data = config.data
    if data.structures is None:
        return None
    workers = max(data.num_workers, 1)
    return prepare(data.structures, data.prepared, alignments=data.alignments, num_workers=workers)


def split_of(config: RunConfig) -> Split:
    """Names of the chains to learn from and to score on, as the run uses them.

    Raises:
        FoldDataError: nothing was prepared, or a chain is not there.
    """
    chains = Chains(config.data.prepared)
    split = split_chains(chains, config.data)
    lengths = {record["name"]: len(record["sequence"]) for record in chains.records}
    scored: Iterable[str] = split.train if config.evaluation.on_training_chains else split.heldout
    fitting = [name for name in scored if lengths[name] <= config.evaluation.max_length]
    return Split(split.train, fitting[: config.evaluation.max_chains])


def build_model(config: RunConfig, topology: Topology) -> ParallelModel:
    """This rank's copy of the network, drawn from the run's seed."""
    training = config.training
    torch.manual_seed(training.seed)
    with torch.device(topology.device):
        model = AlphaFold(config.model).to(training.precision.storage_dtype)
    table = ParameterTable(topology)
    parallelize(
        model,
        topology,
        sharding.plan(config.model),
        training.precision,
        table,
        regions=training.recompute,
        data_parallel=training.data_parallel,
    )
    return ParallelModel([model], table, topology)


def make_trainer(config: RunConfig, topology: Topology, folder: Path | None) -> FoldTrainer:
    """The trainer of one rank; the data must have been prepared.

    Args:
        config: the run.
        topology: the ranks.
        folder: of the run; None saves nothing.
    """
    training, split = config.training, split_of(config)
    axis = topology.axis("dp-cp")
    samples = StepSamples(
        training_samples(config, Chains(config.data.prepared, split.train)),
        batch_size=training.global_batch_size,
        most_recycles=config.features.num_recycles,
        rank=axis.rank,
        size=axis.size,
        num_workers=config.data.num_workers,
    )
    data = config.data.to_dict()
    return FoldTrainer(
        config,
        build_model(config, topology),
        samples,
        Chains(config.data.prepared, split.heldout),
        checkpoints=Checkpoints(folder / CHECKPOINTS, training.retention) if folder else None,
        identity={
            "chains": _digest(split.train),
            **{f"model.{name}": value for name, value in config.model.to_dict().items()},
            **{f"features.{name}": value for name, value in config.features.to_dict().items()},
            **{f"data.{name}": data[name] for name in _OF_DATA},
        },
    )


def _digest(names: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def train_rank(config: RunConfig, folder: Path, tensorboard: bool = False) -> Outcome:
    """Train on this rank, from the newest checkpoint in ``folder`` if there is one.

    Every rank of the job calls it; the process group must be there where there is more than one.
    """
    topology = topology_of(LayoutConfig(tp=config.training.dap))
    # Under torchrun the first rank may be preparing the data still.
    Totals(topology.world).sum({"ready": torch.ones((), device=topology.device)})
    trainer = make_trainer(config, topology, folder)
    try:
        step = trainer.resume()
        if topology.world_rank != 0:
            return trainer.fit()
        plain = config.to_dict()
        write_json(folder / RUN_FILE, plain)
        with FoldReport(folder, config.training.steps, step, plain, tensorboard) as report:
            for damaged, what in Checkpoints(folder / CHECKPOINTS).damaged().items():
                report.message(f"the checkpoint after step {damaged} is damaged, left out: {what}")
            trainer.report = report
            return trainer.fit()
    finally:
        trainer.samples.close()


def load_run_model(
    folder: Path, step: int | None = None, *, average: bool = True
) -> tuple[AlphaFold, int]:
    """The network of a run and how many steps it was trained, on the CPU, in eval mode.

    Args:
        folder: of the run.
        step: of the checkpoint; None is the newest whole one.
        average: the moving average of its parameters, where the run has one, not the parameters.

    Raises:
        CheckpointError: the folder is not one of a run, has no such checkpoint, or a damaged one.
    """
    config = read_run(folder, RunConfig, "fivefold-fold")
    path = checkpoint_of(folder, step)
    model = AlphaFold(config.model).to(config.training.precision.storage_dtype)
    kind = "ema" if average and config.training.ema_decay is not None else MODEL
    pieces = ParameterTable.of(model).pieces(model)
    load_parts(path, {f"{kind}.{p.name}": TensorPart(p.tensor, p.box, p.shape) for p in pieces})
    return model.eval(), read_state(path)["step"]
