"""The law of equality: training under a layout beside plain torch in one process."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fivefold.moe import MoEConfig, MoEForCausalLM, sharding
from fivefold.moe.dispatchers import DispatchConfig
from fivefold.moe.router_config import RouterConfig
from fivefold.parallel_core import testing
from fivefold.parallel_core.build import build, make_runner
from fivefold.parallel_core.context import take_held
from fivefold.parallel_core.data_parallel import Precision
from fivefold.parallel_core.data_parallel_config import DataParallelConfig
from fivefold.parallel_core.documents import starts_of_ids
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.parameters import ParameterTable, initialise
from fivefold.parallel_core.pipeline_config import PipelineConfig
from fivefold.parallel_core.sequence_split import ContextConfig
from fivefold.parallel_core.testing import (
    Job,
    Lesson,
    Record,
    Verdict,
    num_valid,
    train_plainly,
)
from fivefold.parallel_core.topology import Topology

SEED, BATCH, LENGTH, STEPS = 7, 8, 16, 3
DOUBLE = Precision(parameters="float64", compute="float64")
LOSSES = ("aux_loss", "global_loss", "z_loss")

# The vocabulary divides by no axis, and there are fewer key heads than query heads.
MODEL = MoEConfig(
    vocab_size=37,
    hidden_size=16,
    num_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    expert_intermediate_size=16,
    num_experts=8,
    num_experts_per_token=2,
    router=RouterConfig(aux_loss_coef=0.1, z_loss_coef=0.01),
    initializer_range=0.3,
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout of 8 ranks and what else differs.

    Attributes:
        degrees: of ``Layout``, as pairs.
        model: configuration.
        stages_per_rank: more than 1 is the interleaved schedule.
        microbatch_size: sequences in a microbatch; there are as many as fill the batch.
        precision: dtypes.
        data: what is sharded over the data axes.
        recompute: what backward recomputes.
        context: form of attention and split of sequences over "cp".
        packed: several documents in each sequence.
        dispatch: how tokens come to their experts.
        world: number of ranks.
        steps: of training.
    """

    degrees: tuple[tuple[str, int | str], ...]
    model: MoEConfig = MODEL
    stages_per_rank: int = 1
    microbatch_size: int = 2
    precision: Precision = DOUBLE
    data: DataParallelConfig = DataParallelConfig()  # noqa: RUF009
    recompute: str = "none"
    context: ContextConfig = ContextConfig()  # noqa: RUF009
    packed: bool = False
    dispatch: DispatchConfig = DispatchConfig()  # noqa: RUF009
    world: int = 8
    steps: int = STEPS

    def __str__(self) -> str:
        words = [f"{name}={degree}" for name, degree in self.degrees] or ["data"]
        words += _differences(self.model.to_dict(), MODEL.to_dict())
        words += [f"{self.stages_per_rank} stages"] * (self.stages_per_rank > 1)
        words += [f"microbatch={self.microbatch_size}"] * (self.microbatch_size != 2)
        words += [self.precision.compute] * (self.precision.compute != "float64")
        words += [f"{k}={v}" for k, v in self.data.to_dict().items() if v not in (None, "zero2")]
        words += [f"{self.context.attention} {self.context.split}"] * (
            self.context != ContextConfig()
        )
        words += [self.dispatch.dispatcher] * (self.dispatch != DispatchConfig())
        words += [f"recompute {self.recompute}"] * (self.recompute != "none")
        words += ["packed"] * self.packed
        words += [f"{self.world} ranks"] * (self.world != 8)
        words += [f"{self.steps} steps"] * (self.steps != STEPS)
        return " ".join(words)


def _differences(found: Mapping[str, Any], default: Mapping[str, Any]) -> list[str]:
    """What differs, in words; tables inside tables too."""
    words = []
    for key, value in found.items():
        if isinstance(value, dict):
            words += _differences(value, default[key])
        elif value != default[key]:
            words.append(f"{key}={value}")
    return words


def batch(vocab_size: int) -> tuple[Tensor, Tensor]:
    """Ids and targets (B, S); one sequence has no targets, another few, so ranks have unequally."""
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randint(0, vocab_size, (2, BATCH, LENGTH), generator=generator)
    targets[0, :5] = targets[3, 2:] = targets[5] = -100
    return inputs, targets


def packed_starts() -> Tensor:
    """Where each token's document starts (B, S), in four packings."""
    lengths = ([1, 5, 1, 7, 2], [3, 13], [16], [4, 4, 8])
    ids = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]
    return starts_of_ids(torch.stack(ids)).repeat(BATCH // len(ids), 1)


def plain_run(config: MoEConfig, packed: bool = False, steps: int = STEPS) -> Record:
    """Train the whole model on the whole batch with torch's own loss, clipping and AdamW."""
    model = MoEForCausalLM(config).double()
    initialise(ParameterTable.of(model).pieces(model), model.initialisation, SEED)
    inputs, targets = batch(config.vocab_size)
    starts = packed_starts() if packed else None
    return train_plainly(
        model, lambda: model(inputs, document_starts=starts), targets, lesson(steps)
    )


def lesson(steps: int) -> Lesson:
    """How both are trained."""
    return Lesson(num_sequences=BATCH, steps=steps, losses=LOSSES)


def data_of(case: Case, topology: Topology) -> list[Tensor]:
    """A rank's ids and targets, and starts of documents where they are packed."""
    dp, cp = topology.axis("dp"), topology.axis("cp")
    wholes = batch(case.model.vocab_size) + (packed_starts(),) * case.packed
    mine = (whole.chunk(dp.size)[dp.rank] for whole in wholes)
    return [take_held(rows, cp, case.context.split) for rows in mine]


def make_job(case: Case) -> Job:
    """Build and initialise on this rank."""
    topology = Topology(Layout(dist.get_world_size(), **dict(case.degrees)))  # type: ignore[arg-type]
    layout, config = topology.layout, case.model
    pipeline = PipelineConfig(
        schedule="1F1B" if case.stages_per_rank == 1 else "Interleaved1F1B",
        stages_per_rank=case.stages_per_rank,
    )
    sharding.check(config, layout, LENGTH, case.context)
    model = build(
        lambda: MoEForCausalLM(config),
        topology,
        sharding.plan(config, case.context, case.dispatch),
        head=sharding.HEAD,
        tail=sharding.TAIL,
        pipeline=pipeline,
        precision=case.precision,
        data_parallel=case.data,
        regions=case.recompute,
    )
    model.initialise(model.parts[0].initialisation, SEED)
    runner = make_runner(
        model,
        pipeline,
        num_microbatches=BATCH // layout.dp // case.microbatch_size,
        microbatch_size=case.microbatch_size,
        sequence_length=LENGTH,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        dtype=case.precision.compute_dtype,
    )
    count = num_valid(batch(config.vocab_size)[1])
    return Job(model, runner, data_of(case, topology), count, lesson(case.steps))


def judge(case: Case, expected: Record) -> Verdict:
    """Run a case on this rank."""
    return testing.judge(make_job(case), expected)


def with_model(**changes: object) -> MoEConfig:
    """``MODEL`` with other values."""
    return replace(MODEL, **changes)  # type: ignore[arg-type]
