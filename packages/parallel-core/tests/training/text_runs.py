"""A tiny run of the toy on text: its configuration, its text and what trains it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fivefold.parallel_core.build import ParallelModel, build
from fivefold.parallel_core.config import Config
from fivefold.parallel_core.topology import Topology
from fivefold.parallel_core.training.loop import Trainer
from fivefold.parallel_core.training.run import DataConfig, TextRun
from fivefold.parallel_core.training.run_rank import text_trainer, training_runner

from ..toy import HEAD, TAIL, Toy, ToyConfig, plan, rule


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(Config):
    """What is said of the model."""

    vocab_size: int
    eos_token_id: int | None = None
    num_layers: int = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class MoreData(DataConfig):
    """Data with an option of the package's own."""

    separate_documents: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ToyRun(TextRun):
    """A run of the toy."""

    model: ModelConfig
    data: MoreData = field(default_factory=MoreData)


def written(folder: Path) -> dict[str, Any]:
    """Text of ten documents in ``folder``, and the file of a run on it."""
    (folder / "text").mkdir()
    for number in range(10):
        text = f"document {number} " + "word " * (10 + number)
        (folder / "text" / f"{number}.txt").write_text(text)
    return {
        "data": {
            "source": str(folder / "text"),
            "cache": str(folder / "cache"),
            "heldout_fraction": 0.3,
        },
        "training": {
            "steps": 4,
            "global_batch_size": 2,
            "microbatch_size": 1,
            "sequence_length": 16,
            "checkpoint_every": 2,
            "schedule": {"learning_rate": 0.01},
        },
    }


def sizes_of(config: ToyRun) -> ToyConfig:
    """Sizes of a run's model."""
    return ToyConfig(vocab_size=config.model.vocab_size, num_layers=config.model.num_layers)


def toy(config: ToyRun) -> Toy:
    """The whole model."""
    return Toy(sizes_of(config))


def trainer_of(config: ToyRun, folder: Path | None) -> Trainer:
    """What trains a run in this process."""
    model: ParallelModel = build(
        lambda: toy(config), Topology.local(), plan(sizes_of(config)), head=HEAD, tail=TAIL
    )
    model.initialise(rule, config.training.seed)
    runner = training_runner(
        config.training, model, hidden_size=12, vocab_size=config.model.vocab_size
    )
    return text_trainer(
        config,
        model,
        runner,
        folder,
        split="contiguous",
        separate_documents=config.data.separate_documents,
        identity={"layers": config.model.num_layers},
        summarise=lambda sums, count: {"sequences": float(count)},
    )
