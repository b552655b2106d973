"""What one rank of a run does: it builds, goes on from the newest checkpoint, trains and tells."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fivefold.parallel_core.build import ParallelModel, make_runner
from fivefold.parallel_core.checkpoint import Checkpoints
from fivefold.parallel_core.config import Config
from fivefold.parallel_core.files import write_json
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.pipeline import Runner
from fivefold.parallel_core.regions import check_regions
from fivefold.parallel_core.sequence_split import Split
from fivefold.parallel_core.topology import Topology
from fivefold.parallel_core.training.base_loop import Loop
from fivefold.parallel_core.training.config import TrainingConfig
from fivefold.parallel_core.training.ends import Outcome
from fivefold.parallel_core.training.loop import Trainer
from fivefold.parallel_core.training.report import RunReport
from fivefold.parallel_core.training.run import (
    CHECKPOINTS,
    RUN_FILE,
    TOKENIZER,
    LayoutConfig,
    TextRun,
)
from fivefold.parallel_core.training.run_batches import heldout_batches, in_bits, training_batches
from fivefold.parallel_core.training.tokenizer import check_vocabulary


def device_of_rank() -> torch.device:
    """Where this rank trains: its GPU, or the CPU where the ranks meet over gloo."""
    if torch.cuda.is_available() and dist.is_initialized() and dist.get_backend() != "gloo":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def topology_of(config: LayoutConfig) -> Topology:
    """All ranks of the job as ``config`` lays them out; one where no process group is there."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    return Topology(config.layout(world_size), device=device_of_rank())


def check_training(
    training: TrainingConfig, layout: Layout, make_model: Callable[[], nn.Module]
) -> None:
    """Check that a run of a language model can be trained under a layout.

    Args:
        training: the run.
        layout: of all its ranks.
        make_model: makes the whole model; it is made without memory.

    Raises:
        ConfigError: the batch does not divide, the schedule needs more microbatches, a form of
            data parallelism does not fit, or the model has no such region to recompute.
    """
    training.num_microbatches(layout.dp, layout.pp)
    training.data_parallel.check(layout)
    with torch.device("meta"):
        check_regions(make_model(), training.recompute)


def training_runner(
    training: TrainingConfig,
    model: ParallelModel,
    *,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype | None = None,
) -> Runner:
    """What runs a step's microbatches through this rank's part of a language model.

    Args:
        training: the run.
        model: this rank's part.
        hidden_size: of what goes from stage to stage.
        vocab_size: of the logits.
        dtype: of what goes from stage to stage; None is that of the run's matrix products.
    """
    return make_runner(
        model,
        training.pipeline,
        num_microbatches=training.num_microbatches(
            model.topology.size("dp"), model.topology.size("pp")
        ),
        microbatch_size=training.microbatch_size,
        sequence_length=training.sequence_length,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        dtype=dtype or training.precision.compute_dtype,
    )


def text_trainer(
    config: TextRun,
    model: ParallelModel,
    runner: Runner,
    folder: Path | None,
    *,
    split: Split,
    separate_documents: bool,
    identity: Mapping[str, Any],
    summarise: Callable[[Mapping[str, Tensor], int], dict[str, float]],
) -> Trainer:
    """The trainer of one rank; the text must have been prepared.

    Args:
        config: the run.
        model: this rank's part, with values.
        runner: runs its microbatches.
        folder: of the run; None saves nothing.
        split: how the ranks of "cp" split a sequence.
        separate_documents: see ``training_batches``.
        identity: what a resumed run must share beside the text.
        summarise: see ``Trainer``.

    Raises:
        DataError: the text's ids are more than the model's, or it is too short for one sample.
    """
    training, topology = config.training, model.topology
    dataset = config.data.prepare(config.data.load_tokenizer())
    check_vocabulary(dataset, config.model.vocab_size)
    place = (training, dataset, topology, split)
    return Trainer(
        training,
        model,
        runner,
        training_batches(*place, separate_documents=separate_documents),
        heldout_batches(*place, separate_documents=separate_documents),
        checkpoints=checkpoints_of(folder, training),
        identity={"data": dataset.fingerprint, **identity},
        summarise=summarise,
    )


def checkpoints_of(folder: Path | None, training: TrainingConfig) -> Checkpoints | None:
    """The checkpoints of a run's folder; None where there is no folder."""
    return None if folder is None else Checkpoints(folder / CHECKPOINTS, training.retention)


@contextmanager
def reported(
    trainer: Loop, config: Config, folder: Path, tensorboard: bool = False
) -> Iterator[RunReport]:
    """Write the run's configuration and open its report; on rank 0, after ``resume``.

    Checkpoints that are damaged are told of.

    Args:
        trainer: that of this rank; the report is not given to it.
        config: the run.
        folder: of the run.
        tensorboard: write TensorBoard events too.
    """
    plain = config.to_dict()
    write_json(folder / RUN_FILE, plain)
    with RunReport(folder, trainer.config.steps, trainer.step, plain, tensorboard) as report:
        for damaged, what in Checkpoints(folder / CHECKPOINTS).damaged().items():
            report.message(f"the checkpoint after step {damaged} is damaged and left out: {what}")
        yield report


def train_on_text(
    trainer: Trainer, config: TextRun, folder: Path, tensorboard: bool = False
) -> Outcome:
    """Train on this rank, from the newest checkpoint in ``folder`` if there is one.

    Every rank of the job calls it. The folder gets the configuration and the tokenizer, losses are
    told in bits a byte too.

    Args:
        trainer: that of this rank.
        config: the run.
        folder: of the run.
        tensorboard: write TensorBoard events too.
    """
    trainer.resume()
    if trainer.topology.world_rank != 0:
        return trainer.fit()
    tokenizer = config.data.load_tokenizer()
    with reported(trainer, config, folder, tensorboard) as report:
        tokenizer.save(folder / TOKENIZER)
        trainer.report = in_bits(report, config.data.prepare(tokenizer))
        return trainer.fit()
