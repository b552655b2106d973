"""A training run of a hybrid language model: from a TOML file to checkpoints."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fivefold.hybrid_ssm import sharding
from fivefold.hybrid_ssm.config import HybridConfig
from fivefold.hybrid_ssm.initial import DRAWN, head_values, rule
from fivefold.hybrid_ssm.model import HybridForCausalLM
from fivefold.hybrid_ssm.sharding import HybridContextConfig
from fivefold.parallel_core.build import ParallelModel, build, make_runner
from fivefold.parallel_core.checkpoint import Checkpoints
from fivefold.parallel_core.config import Config, load_toml, override, replace
from fivefold.parallel_core.context import gather_held, take_held
from fivefold.parallel_core.documents import starts_after
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.files import write_json
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.parameters import Piece
from fivefold.parallel_core.parameters import initialise as draw
from fivefold.parallel_core.pipeline import Runner
from fivefold.parallel_core.regions import check_regions
from fivefold.parallel_core.topology import Topology
from fivefold.parallel_core.training.loop import Outcome, Trainer, TrainingConfig
from fivefold.parallel_core.training.report import RunReport
from fivefold.parallel_core.training.run import (
    CHECKPOINTS,
    RUN_FILE,
    TOKENIZER,
    DataConfig,
    LayoutConfig,
    device_of_rank,
    end_schedule_with_run,
    heldout_batches,
    in_bits,
    table_of,
    training_batches,
)
from fivefold.parallel_core.training.tokenizer import check_vocabulary


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig(Config):
    """All of a run, as in the sections of its TOML file.

    Attributes:
        packed: whether a document sees only itself: states, convolutions and attention start anew
            after each end of a text. Without, a row is one text.
    """

    model: HybridConfig
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    context: HybridContextConfig = field(default_factory=HybridContextConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig
    packed: bool = True


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
    data = DataConfig.from_dict(table_of(raw, "data"), "data")
    of_data = {key[5:]: value for key, value in overrides.items() if key.startswith("data.")}
    tokenizer = override(data, of_data).load_tokenizer()
    raw["model"] = {"vocab_size": tokenizer.vocab_size, **table_of(raw, "model")}
    end_schedule_with_run(raw, overrides)
    config = override(RunConfig.from_dict(raw), overrides)
    check_vocabulary(tokenizer, config.model.vocab_size)
    if config.model.eos_token_id is not None:
        return config
    model = replace(config.model, eos_token_id=tokenizer.end_of_text_id)
    return replace(config, model=model)


def check(config: RunConfig, world_size: int) -> Layout:
    """Check everything that can be checked before ranks are started.

    Returns:
        The layout.

    Raises:
        LayoutError: the degrees do not fit the number of ranks.
        HybridConfigError: the model does not fit the layout.
        ConfigError: the batch does not fit it, the schedule needs more microbatches, or documents
            are packed and no token ends them.
    """
    layout = config.layout.layout(world_size)
    training = config.training
    if config.packed and config.model.eos_token_id is None:
        raise ConfigError(
            "packed=true, and no token ends a text: set data.end_of_text or model.eos_token_id, or "
            "packed=false"
        )
    sharding.check(config.model, layout, training.sequence_length, config.context)
    training.num_microbatches(layout.dp, layout.pp)
    training.data_parallel.check(layout)
    sharding.check_stages(config.model, layout.pp * training.pipeline.stages_per_rank)
    with torch.device("meta"):
        check_regions(HybridForCausalLM(config.model), training.recompute)
    return layout


@torch.no_grad()
def initialise(pieces: Iterable[Piece], config: HybridConfig, seed: int) -> None:
    """Draw all parameters, so that the whole model does not depend on the layout.

    Args:
        pieces: what this rank holds.
        config: the model's.
        seed: of the whole model.
    """
    pieces = list(pieces)
    draw(pieces, lambda name: rule(config, name), seed)
    for piece in pieces:
        if piece.name.endswith(DRAWN):
            values = head_values(config, piece.name, seed)
            piece.tensor.copy_(values[piece.box.slices])


class DocumentRunner(Runner):
    """A runner whose documents end with a token of the text.

    Args:
        runner: of the model.
        topology: the ranks.
        context: how they split sequences.
        end_id: the token that ends a text.
    """

    def __init__(
        self, runner: Runner, topology: Topology, context: HybridContextConfig, end_id: int
    ):
        self.runner, self.axis = runner, topology.axis("cp")
        self.split, self.end_id = context.split, end_id

    def train(
        self, inputs: Tensor, targets: Tensor, scale: float, starts: Tensor | None = None
    ) -> Tensor:
        """See ``Runner.train``; the starts are found in the inputs."""
        return self.runner.train(inputs, targets, scale, self._starts(inputs))

    def evaluate(self, inputs: Tensor, targets: Tensor, starts: Tensor | None = None) -> Tensor:
        """See ``Runner.evaluate``."""
        return self.runner.evaluate(inputs, targets, self._starts(inputs))

    def _starts(self, ids: Tensor) -> Tensor:
        """Of this rank's tokens, whose documents may have begun on another rank."""
        if self.axis.size == 1:
            return starts_after(ids, self.end_id)
        whole = gather_held(ids, self.axis, self.split)
        return take_held(starts_after(whole, self.end_id), self.axis, self.split)


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
    initialise(model.pieces(), config.model, training.seed)
    return model


def make_trainer(config: RunConfig, topology: Topology, folder: Path | None) -> Trainer:
    """The trainer of one rank; the text must have been prepared.

    Args:
        config: the run.
        topology: the ranks.
        folder: of the run; None saves nothing.
    """
    training, split = config.training, config.context.split
    dataset = config.data.prepare(config.data.load_tokenizer())
    check_vocabulary(dataset, config.model.vocab_size)
    model = build_model(config, topology)
    return Trainer(
        training,
        model,
        _runner(config, model),
        training_batches(training, dataset, topology, split),
        heldout_batches(training, dataset, topology, split),
        checkpoints=Checkpoints(folder / CHECKPOINTS, training.retention) if folder else None,
        identity={
            "data": dataset.fingerprint,
            "packed": config.packed,
            **_model_identity(config.model),
        },
        summarise=summarise,
    )


def _runner(config: RunConfig, model: ParallelModel) -> Runner:
    training, topology = config.training, model.topology
    wide = config.model.residual_in_fp32 and training.precision.compute == "bfloat16"
    runner = make_runner(
        model,
        training.pipeline,
        num_microbatches=training.num_microbatches(topology.size("dp"), topology.size("pp")),
        microbatch_size=training.microbatch_size,
        sequence_length=training.sequence_length,
        hidden_size=config.model.hidden_size,
        vocab_size=config.model.vocab_size,
        dtype=torch.float32 if wide else training.precision.compute_dtype,
    )
    ends = config.model.eos_token_id
    if not config.packed or ends is None:
        return runner
    end_id = ends if isinstance(ends, int) else ends[0]
    return DocumentRunner(runner, topology, config.context, end_id)


def _model_identity(config: HybridConfig) -> dict[str, Any]:
    """What makes it the same model: all but how it is initialised and which losses are added."""
    free = {
        "initializer_range",
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


def summarise(sums: Mapping[str, Tensor], num_sequences: int) -> dict[str, float]:
    """Figures of the routers from the sums over a step; nothing for models without experts.

    Returns:
        Mean ``aux_loss`` and ``z_loss`` of a sequence, summed over layers; and the load of the
        busiest expert over the mean one, in the worst layer and as the mean over layers.
    """
    figures = {
        name: float(sums[name]) / num_sequences for name in ("aux_loss", "z_loss") if name in sums
    }
    ratios = [
        float(load.max() / load.mean()) for name, load in sums.items() if name.startswith("load.")
    ]
    if ratios:
        figures["load_max_over_mean"] = sum(ratios) / len(ratios)
        figures["load_max_over_mean_worst"] = max(ratios)
    return figures


def train_rank(config: RunConfig, folder: Path, tensorboard: bool = False) -> Outcome:
    """Train on this rank, from the newest checkpoint in ``folder`` if there is one.

    Every rank of the job calls it; the process group must be there where there is more than one.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    topology = Topology(config.layout.layout(world_size), device=device_of_rank())
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
        trainer.report = in_bits(report, dataset)
        return trainer.fit()
