"""A training run of a mixture-of-experts language model: from a TOML file to checkpoints."""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fivefold.moe import sharding
from fivefold.moe.config import MoEConfig
from fivefold.moe.dispatchers import DispatchConfig
from fivefold.moe.load import LoadFigures, plot_load
from fivefold.moe.model import MoEForCausalLM
from fivefold.parallel_core.build import ParallelModel, build, make_runner
from fivefold.parallel_core.checkpoint import Checkpoints
from fivefold.parallel_core.config import Config, load_toml, override, replace
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.files import write_json
from fivefold.parallel_core.layout import DEFAULT_ORDER, Layout
from fivefold.parallel_core.regions import check_regions
from fivefold.parallel_core.sequence_split import ContextConfig
from fivefold.parallel_core.topology import Topology
from fivefold.parallel_core.training.data import EvaluationBatches, TextBatches
from fivefold.parallel_core.training.loop import Outcome, Report, Trainer, TrainingConfig
from fivefold.parallel_core.training.report import METRICS, RunReport
from fivefold.parallel_core.training.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from fivefold.parallel_core.training.tokens import TokenDataset, prepare

CHECKPOINTS = "checkpoints"
RUN_FILE = "run.json"
TOKENIZER = "tokenizer"
LOAD_PICTURE = "load.png"
_OF_TRAINING = {
    "initializer_range",
    "max_position_embeddings",
    "capacity",
    *(f"router.{loss}_loss_coef" for loss in ("aux", "global", "z")),
    *(f"router.{name}" for name in ("bias_rate", "jitter")),
}


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
        separate_documents: keep the documents of a sequence from seeing each other, with positions
            that count from each one's start. Without, a sequence is one text.
    """

    source: str = "stdlib"
    tokenizer: str = "bytes"
    cache: str = "~/.cache/fivefold/tokens"
    heldout_fraction: float = 0.05
    end_of_text: str | None = None
    separate_documents: bool = False

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer; raises ``DataError`` where it cannot be read."""
        return load_tokenizer(self.tokenizer, self.end_of_text)

    def prepare(self, tokenizer: Tokenizer) -> TokenDataset:
        """The tokenised text, made now if it is not in the cache."""
        cache = Path(self.cache).expanduser()
        return prepare(self.source, tokenizer, cache, heldout_fraction=self.heldout_fraction)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig(Config):
    """All of a run, as in the sections of its TOML file."""

    model: MoEConfig
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig


def load_run(
    source: Path | Mapping[str, Any], overrides: Mapping[str, str] | None = None
) -> RunConfig:
    """Read a run's configuration; a vocabulary size that is left out is the tokenizer's.

    Args:
        source: a TOML file, or the same as a mapping.
        overrides: dotted key to text, as from the command line.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or one that cannot be.
        DataError: the tokenizer has more ids than the model's vocabulary.
    """
    raw = load_toml(source) if isinstance(source, Path) else dict(source)
    overrides = dict(overrides or {})
    tables = {name: _table(raw, name) for name in ("model", "data", "training")}
    data = DataConfig.from_dict(tables["data"], "data")
    of_data = {key[5:]: value for key, value in overrides.items() if key.startswith("data.")}
    tokenizer = override(data, of_data).load_tokenizer()
    raw["model"] = {"vocab_size": tokenizer.vocab_size, **tables["model"]}
    _default_schedule(raw, tables["training"], overrides)
    config = override(RunConfig.from_dict(raw), overrides)
    check_vocabulary(tokenizer, config.model.vocab_size)
    if config.model.eos_token_id is not None:
        return config
    model = replace(config.model, eos_token_id=tokenizer.end_of_text_id)
    return replace(config, model=model)


def _table(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section of the file; empty where it is left out."""
    table = raw.get(name, {})
    if not isinstance(table, Mapping):
        raise ConfigError(f"{name}: found {table!r}, expected a table: [{name}]")
    return table


def _default_schedule(
    raw: dict[str, Any], training: Mapping[str, Any], overrides: dict[str, str]
) -> None:
    """Let the schedule end with the run where the file does not say otherwise."""
    schedule = _table(training, "schedule")
    if "steps" in training and "total_steps" not in schedule:
        schedule = {**schedule, "total_steps": training["steps"]}
        raw["training"] = {**training, "schedule": schedule}
        if "training.steps" in overrides:
            overrides.setdefault("training.schedule.total_steps", overrides["training.steps"])


def check(config: RunConfig, world_size: int) -> Layout:
    """Check everything that can be checked before ranks are started.

    Returns:
        The layout.

    Raises:
        LayoutError: the degrees do not fit the number of ranks.
        MoEConfigError: the model does not fit the layout.
        ConfigError: the batch does not fit it, or the schedule needs more microbatches.
    """
    layout = config.layout.layout(world_size)
    length, longest = config.training.sequence_length, config.model.max_position_embeddings
    if length > longest:
        raise ConfigError(
            f"training.sequence_length={length} is more than model.max_position_embeddings="
            f"{longest}, the longest the model is meant for; change one of them"
        )
    sharding.check(config.model, layout, config.training.sequence_length, config.context)
    stages = layout.pp * config.training.pipeline.stages_per_rank
    config.training.num_microbatches(layout.dp, layout.pp)
    config.training.data_parallel.check(layout)
    sharding.check_stages(config.model, stages)
    with torch.device("meta"):
        check_regions(MoEForCausalLM(config.model), config.training.recompute)
    return layout


def check_text(config: RunConfig, dataset: TokenDataset) -> None:
    """Check that the text is long enough for one sample.

    Raises:
        DataError: it is not.
    """
    TextBatches(
        dataset.tokens("train"),
        sequence_length=config.training.sequence_length,
        global_batch_size=1,
        seed=config.training.seed,
    )


def build_model(config: RunConfig, topology: Topology) -> ParallelModel:
    """This rank's part of the run's model, initialised from the run's seed."""
    model = build(
        lambda: MoEForCausalLM(config.model),
        topology,
        sharding.plan(config.model, config.context, config.dispatch),
        head=sharding.HEAD,
        tail=sharding.TAIL,
        pipeline=config.training.pipeline,
        precision=config.training.precision,
        data_parallel=config.training.data_parallel,
        regions=config.training.recompute,
    )
    first: Any = model.parts[0]
    model.initialise(first.initialisation, config.training.seed)
    return model


def make_trainer(config: RunConfig, topology: Topology, folder: Path | None) -> Trainer:
    """The trainer of one rank; the text must have been prepared.

    Args:
        config: the run.
        topology: the ranks.
        folder: of the run; None saves nothing.
    """
    training = config.training
    dataset = config.data.prepare(config.data.load_tokenizer())
    check_vocabulary(dataset, config.model.vocab_size)
    place: dict[str, Any] = {
        f"{axis}_{what}": getattr(topology, what)(axis)
        for axis in ("dp", "cp")
        for what in ("rank", "size")
    }
    place["split"] = config.context.split
    if config.data.separate_documents:
        place["end_of_text_id"] = dataset.end_of_text_id
    batches = TextBatches(
        dataset.tokens("train"),
        sequence_length=training.sequence_length,
        global_batch_size=training.global_batch_size,
        seed=training.seed,
        **place,
    )
    heldout = _heldout(config, dataset, place)
    model = build_model(config, topology)
    runner = make_runner(
        model,
        training.pipeline,
        num_microbatches=training.num_microbatches(topology.size("dp"), topology.size("pp")),
        microbatch_size=training.microbatch_size,
        sequence_length=training.sequence_length,
        hidden_size=config.model.hidden_size,
        vocab_size=config.model.vocab_size,
        dtype=training.precision.compute_dtype,
    )
    return Trainer(
        training,
        model,
        runner,
        batches,
        heldout,
        checkpoints=Checkpoints(folder / CHECKPOINTS, training.retention) if folder else None,
        identity={
            "data": dataset.fingerprint,
            # Not False, which checkpoints of runs that did not know of it do not have.
            "separate_documents": config.data.separate_documents or None,
            **_model_identity(config.model),
        },
        summarise=LoadFigures(
            ep=topology.size("ep"),
            edp=topology.size("edp"),
            row_bytes=config.model.hidden_size * training.precision.compute_dtype.itemsize,
        ),
    )


def _model_identity(config: MoEConfig) -> dict[str, Any]:
    """What makes it the same model: all but how it is initialised and how it is trained."""
    plain = config.to_dict()
    plain |= {f"router.{key}": value for key, value in plain.pop("router").items()}
    return {f"model.{key}": value for key, value in plain.items() if key not in _OF_TRAINING}


def _heldout(
    config: RunConfig, dataset: TokenDataset, place: Mapping[str, Any]
) -> EvaluationBatches | tuple[()]:
    if dataset.num_tokens("heldout") < 2:
        return ()
    return EvaluationBatches(
        dataset.tokens("heldout"),
        sequence_length=config.training.sequence_length,
        global_batch_size=config.training.global_batch_size,
        num_windows=config.training.evaluation_sequences,
        **place,
    )


def _in_bits(report: Report, dataset: TokenDataset) -> Report:
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


def train_rank(config: RunConfig, folder: Path, tensorboard: bool = False) -> Outcome:
    """Train on this rank, from the newest checkpoint in ``folder`` if there is one.

    Every rank of the job calls it; the process group must be there where there is more than one.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    topology = Topology(config.layout.layout(world_size), device=_device())
    trainer = make_trainer(config, topology, folder)
    step = trainer.resume()
    if topology.world_rank != 0:
        return trainer.fit()
    plain = config.to_dict()
    write_json(folder / RUN_FILE, plain)
    tokenizer = config.data.load_tokenizer()
    tokenizer.save(folder / TOKENIZER)
    dataset = config.data.prepare(tokenizer)
    with RunReport(folder, config.training.steps, step, plain, tensorboard) as report:
        for damaged, what in Checkpoints(folder / CHECKPOINTS).damaged().items():
            report.message(f"the checkpoint after step {damaged} is damaged and left out: {what}")
        trainer.report = _in_bits(report, dataset)
        outcome = trainer.fit()
    # Drawn where matplotlib is installed, as the loss curve.
    with suppress(ImportError):
        plot_load(folder / METRICS, folder / LOAD_PICTURE)
    return outcome


def _device() -> torch.device:
    if torch.cuda.is_available() and dist.is_initialized() and dist.get_backend() != "gloo":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
