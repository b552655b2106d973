"""A training run of a hybrid language model: from a TOML file to checkpoints."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fivefold.hybrid_ssm import sharding
from fivefold.hybrid_ssm.config import HybridConfig
from fivefold.hybrid_ssm.fp8.apply import chosen_products, recipe
from fivefold.hybrid_ssm.fp8.config import FP8Config
from fivefold.hybrid_ssm.initial import DRAWN, head_values, rule
from fivefold.hybrid_ssm.model import HybridForCausalLM
from fivefold.hybrid_ssm.sharding import HybridContextConfig
from fivefold.parallel_core.build import ParallelModel, build
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.parameters import Piece
from fivefold.parallel_core.parameters import initialise as draw
from fivefold.parallel_core.pipeline import Runner
from fivefold.parallel_core.topology import Topology
from fivefold.parallel_core.training.expert_load import LoadFigures
from fivefold.parallel_core.training.loop import Outcome, Trainer
from fivefold.parallel_core.training.run import TextRun, load_text_run
from fivefold.parallel_core.training.run_rank import (
    check_training,
    text_trainer,
    topology_of,
    train_on_text,
    training_runner,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig(TextRun):
    """All of a run, as in the sections of its TOML file.

    Attributes:
        packed: whether a document sees only itself: states, convolutions and attention start anew
            after each end of a text. Without, a row is one text.
        fp8: which products of the layers are in FP8, forward and backward; None for none.
    """

    model: HybridConfig
    context: HybridContextConfig = field(default_factory=HybridContextConfig)
    packed: bool = True
    fp8: FP8Config | None = None


def load_run(
    source: Path | Mapping[str, Any], overrides: Mapping[str, str] | None = None
) -> RunConfig:
    """Read a run's configuration; see ``load_text_run``."""
    return load_text_run(RunConfig, source, overrides)


def check(config: RunConfig, world_size: int) -> Layout:
    """Check everything that can be checked before ranks are started.

    Returns:
        The layout.

    Raises:
        LayoutError: the degrees do not fit the number of ranks.
        HybridConfigError: the model does not fit the layout, or has no layer left for FP8.
        ConfigError: the batch does not fit it, or the schedule needs more microbatches.
    """
    layout = config.layout.layout(world_size)
    training = config.training
    sharding.check(config.model, layout, training.sequence_length, config.context)
    check_training(training, layout, lambda: HybridForCausalLM(config.model))
    if config.fp8 is not None:
        chosen_products(config.model, config.fp8)
    sharding.check_stages(config.model, layout.pp * training.pipeline.stages_per_rank)
    return layout


@torch.no_grad()
def initialise(pieces: Iterable[Piece], config: HybridConfig, seed: int) -> None:
    """Draw all parameters, so that the whole model does not depend on the layout.

    Args:
        pieces: what this rank holds, buffers too.
        config: the model's.
        seed: of the whole model.
    """
    pieces = list(pieces)
    draw(pieces, lambda name: rule(config, name), seed)
    for piece in pieces:
        if piece.name.endswith(DRAWN):
            values = head_values(config, piece.name, seed)
            piece.tensor.copy_(values[piece.box.slices])


def build_model(config: RunConfig, topology: Topology) -> ParallelModel:
    """This rank's part of the run's model, initialised from the run's seed."""
    training = config.training
    model = build(
        lambda: HybridForCausalLM(config.model),
        topology,
        sharding.plan(config.model, config.context),
        head=sharding.HEAD,
        tail=sharding.TAIL,
        pipeline=training.pipeline,
        precision=training.precision,
        data_parallel=training.data_parallel,
        regions=training.recompute,
    )
    initialise([*model.pieces(), *model.buffers()], config.model, training.seed)
    compute_in_fp8(model, config)
    return model


def compute_in_fp8(model: ParallelModel, config: RunConfig) -> None:
    """Make this rank's layers compute in FP8, if the run asks for it."""
    if config.fp8 is not None:
        for part in model.parts:
            recipe(part, model.topology, **config.fp8.to_dict())  # type: ignore[arg-type]


def make_trainer(config: RunConfig, topology: Topology, folder: Path | None) -> Trainer:
    """The trainer of one rank; the text must have been prepared.

    Args:
        config: the run.
        topology: the ranks.
        folder: of the run; None saves nothing.
    """
    model = build_model(config, topology)
    width = config.model.latent_size or config.model.hidden_size
    return text_trainer(
        config,
        model,
        _runner(config, model),
        folder,
        split=config.context.split,
        separate_documents=config.packed,
        identity={"packed": config.packed, **_model_identity(config.model)},
        summarise=LoadFigures(
            ep=topology.size("ep"),
            edp=topology.size("edp"),
            row_bytes=width * config.training.precision.compute_dtype.itemsize,
        ),
    )


def _runner(config: RunConfig, model: ParallelModel) -> Runner:
    wide = config.model.residual_in_fp32 and config.training.precision.compute == "bfloat16"
    return training_runner(
        config.training,
        model,
        hidden_size=config.model.hidden_size,
        vocab_size=config.model.vocab_size,
        dtype=torch.float32 if wide else None,
    )


def _model_identity(config: HybridConfig) -> dict[str, Any]:
    """What makes it the same model: all but how it is initialised and which losses are added."""
    free = {
        "initializer_range",
        "bias_rate",
        "aux_loss_coef",
        "z_loss_coef",
        "max_position_embeddings",
        "decay_range",
        "time_step_min",
        "time_step_max",
        "time_step_floor",
        "chunk_size",
    }
    return {f"model.{k}": v for k, v in config.to_dict().items() if k not in free}


def train_rank(config: RunConfig, folder: Path, tensorboard: bool = False) -> Outcome:
    """Train on this rank, from the newest checkpoint in ``folder`` if there is one.

    Every rank of the job calls it; the process group must be there where there is more than one.
    """
    trainer = make_trainer(config, topology_of(config.layout), folder)
    return train_on_text(trainer, config, folder, tensorboard)
