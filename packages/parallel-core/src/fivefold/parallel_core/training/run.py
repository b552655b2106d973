"""What the training run of any language model is told beside the model itself."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fivefold.parallel_core.config import Config
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.layout import DEFAULT_ORDER, Layout
from fivefold.parallel_core.sequence_split import Split
from fivefold.parallel_core.topology import Topology
from fivefold.parallel_core.training.data import EvaluationBatches, TextBatches
from fivefold.parallel_core.training.loop import Report, TrainingConfig
from fivefold.parallel_core.training.tokenizer import Tokenizer, load_tokenizer
from fivefold.parallel_core.training.tokens import TokenDataset, prepare

CHECKPOINTS = "checkpoints"
RUN_FILE = "run.json"
TOKENIZER = "tokenizer"


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutConfig(Config):
    """The degrees of ``Layout``; the data axes take what the number of ranks leaves."""

    tp: int = 1
    cp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    order: str = DEFAULT_ORDER

    def layout(self, world_size: int) -> Layout:
        """The layout of ``world_size`` ranks; raises ``LayoutError`` where there is none."""
        return Layout(world_size, **self.to_dict())


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(Config):
    """What a model is trained on.

    Attributes:
        source: a folder, glob or file of text; "stdlib" is the Python standard library's source.
        tokenizer: "bytes", or a ``tokenizer.json`` or a folder with one.
        cache: folder of the token files.
        heldout_fraction: share of the documents that training never sees.
        end_of_text: the tokenizer's token after each document, where it has no usual one.
    """

    source: str = "stdlib"
    tokenizer: str = "bytes"
    cache: str = "~/.cache/fivefold/tokens"
    heldout_fraction: float = 0.05
    end_of_text: str | None = None

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer; raises ``DataError`` where it cannot be read."""
        return load_tokenizer(self.tokenizer, self.end_of_text)

    def prepare(self, tokenizer: Tokenizer) -> TokenDataset:
        """The tokenised text, made now if it is not in the cache."""
        cache = Path(self.cache).expanduser()
        return prepare(self.source, tokenizer, cache, heldout_fraction=self.heldout_fraction)


def table_of(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section of a run's file; empty where it is left out.

    Raises:
        ConfigError: it is no table.
    """
    table = raw.get(name, {})
    if not isinstance(table, Mapping):
        raise ConfigError(f"{name}: found {table!r}, expected a table: [{name}]")
    return table


def end_schedule_with_run(raw: dict[str, Any], overrides: dict[str, str]) -> None:
    """Let the schedule end with the run where the file does not say otherwise, in place.

    Args:
        raw: the file.
        overrides: from the command line; the number of steps among them counts for both.
    """
    training = table_of(raw, "training")
    schedule = table_of(training, "schedule")
    if "steps" in training and "total_steps" not in schedule:
        schedule = {**schedule, "total_steps": training["steps"]}
        raw["training"] = {**training, "schedule": schedule}
        if "training.steps" in overrides:
            overrides.setdefault("training.schedule.total_steps", overrides["training.steps"])


def place_of(topology: Topology) -> dict[str, int]:
    """This rank's place in the data: what ``TextBatches`` asks for."""
    return {
        f"{axis}_{what}": getattr(topology, what)(axis)
        for axis in ("dp", "cp")
        for what in ("rank", "size")
    }


def check_text(training: TrainingConfig, dataset: TokenDataset) -> None:
    """Check that the text is long enough for one sample.

    Raises:
        DataError: it is not.
    """
    TextBatches(
        dataset.tokens("train"),
        sequence_length=training.sequence_length,
        global_batch_size=1,
        seed=training.seed,
    )


def training_batches(
    training: TrainingConfig, dataset: TokenDataset, topology: Topology, split: Split
) -> TextBatches:
    """This rank's batches of the training text."""
    return TextBatches(
        dataset.tokens("train"),
        sequence_length=training.sequence_length,
        global_batch_size=training.global_batch_size,
        seed=training.seed,
        **place_of(topology),
        split=split,
    )


def heldout_batches(
    training: TrainingConfig, dataset: TokenDataset, topology: Topology, split: Split
) -> EvaluationBatches | tuple[()]:
    """This rank's batches of the held-out text; none where there is none."""
    if dataset.num_tokens("heldout") < 2:
        return ()
    return EvaluationBatches(
        dataset.tokens("heldout"),
        sequence_length=training.sequence_length,
        global_batch_size=training.global_batch_size,
        num_windows=training.evaluation_sequences,
        **place_of(topology),
        split=split,
    )


def in_bits(report: Report, dataset: TokenDataset) -> Report:
    """Add bits per byte of text to every loss; they compare across tokenizers."""

    def tell(step: int, measured: Mapping[str, float]) -> None:
        more = dict(measured)
        for split, key in (("train", "loss"), ("heldout", "heldout_loss")):
            if key in measured:
                tokens = dataset.num_tokens(split)
                bits = measured[key] / math.log(2) * tokens / max(dataset.num_bytes[split], 1)
                more[key.replace("loss", "bits_per_byte")] = bits
        report(step, more)

    return tell


def device_of_rank() -> torch.device:
    """Where this rank trains: its GPU, or the CPU where the ranks meet over gloo."""
    if torch.cuda.is_available() and dist.is_initialized() and dist.get_backend() != "gloo":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
