"""A training run of a mixture-of-experts language model: from a TOML file to checkpoints."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from fivefold.moe import sharding
from fivefold.moe.config import MoEConfig
from fivefold.moe.dispatchers import DispatchConfig
from fivefold.moe.fp8 import recipe
from fivefold.moe.fp8_config import FP8Config
from fivefold.moe.model import MoEForCausalLM
from fivefold.parallel_core.build import ParallelModel, build
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.sequence_split import ContextConfig
from fivefold.parallel_core.topology import Topology
from fivefold.parallel_core.training import run
from fivefold.parallel_core.training.expert_load import LoadFigures, plot_load
from fivefold.parallel_core.training.loop import Outcome, Trainer
from fivefold.parallel_core.training.report import METRICS
from fivefold.parallel_core.training.run_rank import (
    check_training,
    text_trainer,
    topology_of,
    train_on_text,
    training_runner,
)

LOAD_PICTURE = "load.png"
_OF_TRAINING = {
    "initializer_range",
    "max_position_embeddings",
    "capacity",
    *(f"router.{loss}_loss_coef" for loss in ("aux", "global", "z")),
    *(f"router.{name}" for name in ("bias_rate", "jitter")),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(run.DataConfig):
    """What a model is trained on; see the base.

    Attributes:
        separate_documents: keep the documents of a sequence from seeing each other, with positions
            that count from each one's start. Without, a sequence is one text.
    """

    separate_documents: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig(run.TextRun):
    """All of a run, as in the sections of its TOML file.

    ``fp8``, where the file has that section, is what is computed in FP8.
    """

    model: MoEConfig
    data: DataConfig = field(default_factory=DataConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
    fp8: FP8Config | None = None


def load_run(
    source: Path | Mapping[str, Any], overrides: Mapping[str, str] | None = None
) -> RunConfig:
    """Read a run's configuration; see ``load_text_run``."""
    return run.load_text_run(RunConfig, source, overrides)


def check(config: RunConfig, world_size: int) -> Layout:
    """Check everything that can be checked before ranks are started.

    Returns:
        The layout.

    Raises:
        LayoutError: the degrees do not fit the number of ranks.
        MoEConfigError: the model does not fit the layout, or has no layers left for FP8.
        ConfigError: the batch does not fit it, or the schedule needs more microbatches.
    """
    layout = config.layout.layout(world_size)
    length, longest = config.training.sequence_length, config.model.max_position_embeddings
    if length > longest:
        raise ConfigError(
            f"training.sequence_length={length} is more than model.max_position_embeddings="
            f"{longest}, the longest the model is meant for; change one of them"
        )
    sharding.check(config.model, layout, length, config.context)
    if config.fp8 is not None:
        config.fp8.check(config.model.num_layers)
    check_training(config.training, layout, lambda: MoEForCausalLM(config.model))
    sharding.check_stages(config.model, layout.pp * config.training.pipeline.stages_per_rank)
    return layout


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
    if config.fp8 is not None:
        for part in model.parts:
            recipe(cast(MoEForCausalLM, part), topology, **config.fp8.to_dict())
    return model


def make_trainer(config: RunConfig, topology: Topology, folder: Path | None) -> Trainer:
    """The trainer of one rank; the text must have been prepared.

    Args:
        config: the run.
        topology: the ranks.
        folder: of the run; None saves nothing.
    """
    training, separate = config.training, config.data.separate_documents
    model = build_model(config, topology)
    return text_trainer(
        config,
        model,
        training_runner(
            training,
            model,
            hidden_size=config.model.hidden_size,
            vocab_size=config.model.vocab_size,
        ),
        folder,
        split=config.context.split,
        separate_documents=separate,
        # Not False, which checkpoints of runs that did not know of it do not have.
        identity={"separate_documents": separate or None, **_model_identity(config.model)},
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


def train_rank(config: RunConfig, folder: Path, tensorboard: bool = False) -> Outcome:
    """Train on this rank, from the newest checkpoint in ``folder`` if there is one.

    Every rank of the job calls it; the process group must be there where there is more than one.
    """
    topology = topology_of(config.layout)
    trainer = make_trainer(config, topology, folder)
    outcome = train_on_text(trainer, config, folder, tensorboard)
    if topology.world_rank == 0:
        # Drawn where matplotlib is installed, as the loss curve.
        with suppress(ImportError):
            plot_load(folder / METRICS, folder / LOAD_PICTURE)
    return outcome
