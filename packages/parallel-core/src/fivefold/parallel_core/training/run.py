"""What the run of a language model is told beside the model itself, and how that is read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from fivefold.parallel_core.config import Config, load_toml, override, replace
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.layout import DEFAULT_ORDER, Layout
from fivefold.parallel_core.training.config import TrainingConfig
from fivefold.parallel_core.training.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from fivefold.parallel_core.training.tokens import TokenDataset, prepare

CHECKPOINTS = "checkpoints"
RUN_FILE = "run.json"
TOKENIZER = "tokenizer"

_R = TypeVar("_R", bound="TextRun")


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


@dataclass(frozen=True, kw_only=True, slots=True)
class TextRun(Config):
    """All of a run, as in the sections of its TOML file; a package adds its own.

    Attributes:
        model: its configuration, which a package declares; with a ``vocab_size`` and an
            ``eos_token_id`` that may be None.
        layout: degrees of parallelism.
        data: what it is trained on.
        training: how.
    """

    model: Any
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig


def load_text_run(
    kind: type[_R], source: Path | Mapping[str, Any], overrides: Mapping[str, str] | None = None
) -> _R:
    """Read a run's configuration; a vocabulary size that is left out is the tokenizer's.

    Args:
        kind: of the run.
        source: a TOML file, or the same as a mapping.
        overrides: dotted key to text, as from the command line.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or one that cannot be.
        DataError: the tokenizer has more ids than the model's vocabulary.
    """
    raw = load_toml(source) if isinstance(source, Path) else dict(source)
    overrides = dict(overrides or {})
    tokenizer = _data_of(kind, raw, overrides).load_tokenizer()
    raw["model"] = {"vocab_size": tokenizer.vocab_size, **table_of(raw, "model")}
    end_schedule_with_run(raw, overrides)
    config = override(kind.from_dict(raw), overrides)
    check_vocabulary(tokenizer, config.model.vocab_size)
    if config.model.eos_token_id is not None:
        return config
    model = replace(config.model, eos_token_id=tokenizer.end_of_text_id)
    return replace(config, model=model)


def _data_of(
    kind: type[TextRun], raw: Mapping[str, Any], overrides: Mapping[str, str]
) -> DataConfig:
    """The section on data alone, which says what the model's vocabulary is."""
    declared: type[DataConfig] = get_type_hints(kind)["data"]
    data = declared.from_dict(table_of(raw, "data"), "data")
    of_data = {key[5:]: value for key, value in overrides.items() if key.startswith("data.")}
    return override(data, of_data)


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
