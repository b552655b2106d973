"""The law of equality: training under a layout beside plain torch in one process."""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from fivefold.hybrid_ssm import HybridConfig, HybridForCausalLM, sharding
from fivefold.hybrid_ssm.train import initialise
from fivefold.parallel_core import testing
from fivefold.parallel_core.build import build, make_runner
from fivefold.parallel_core.context import take_held
from fivefold.parallel_core.data_parallel import Precision
from fivefold.parallel_core.documents import starts_of_ids
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.parameters import ParameterTable
from fivefold.parallel_core.pipeline_config import PipelineConfig
from fivefold.parallel_core.testing import (
    Job,
    Lesson,
    Record,
    Verdict,
    num_valid,
    train_plainly,
)
from fivefold.parallel_core.topology import Topology

SEED, BATCH, LENGTH, STEPS = 7, 8, 24, 2
DOUBLE = Precision(parameters="float64", compute="float64")
LESSON = Lesson(num_sequences=BATCH, steps=STEPS, losses=("aux_loss", "z_loss"))

# The vocabulary divides by no axis, there are fewer key heads than query heads, and the layers
# divide by no number of stages.
MODEL = HybridConfig(
    vocab_size=37,
    hidden_size=16,
    pattern="M-ME*EM",
    num_mamba_heads=8,
    mamba_head_dim=6,
    state_size=5,
    num_groups=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=24,
    num_experts=8,
    num_experts_per_token=2,
    expert_intermediate_size=16,
    shared_intermediate_size=20,
    latent_size=12,
    bias_rate=0.02,
    aux_loss_coef=0.1,
    z_loss_coef=0.01,
    initializer_range=0.3,
    time_step_min=0.05,
    time_step_max=0.9,
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout and what else differs.

    Attributes:
        world: number of ranks.
        degrees: of ``Layout``, as pairs.
        model: configuration.
        stages_per_rank: more than 1 is the interleaved schedule.
        microbatch_size: sequences in a microbatch; there are as many as fill the batch.
        recompute: what backward recomputes.
        context: how layers cross a split sequence.
        packed: whether rows are of several documents.
    """

    world: int
    degrees: tuple[tuple[str, int], ...]
    model: HybridConfig = MODEL
    stages_per_rank: int = 1
    microbatch_size: int = 2
    recompute: str = "none"
    context: sharding.HybridContextConfig = sharding.HybridContextConfig()  # noqa: RUF009
    packed: bool = False

    def __str__(self) -> str:
        words = [f"{name}={degree}" for name, degree in self.degrees] or ["data"]
        default = MODEL.to_dict()
        words += [f"{k}={v}" for k, v in self.model.to_dict().items() if v != default[k]]
        words += [f"{self.stages_per_rank} stages"] * (self.stages_per_rank > 1)
        words += [f"{k} {v}" for k, v in self.context.to_dict().items() if v != "contiguous"]
        words += ["packed"] * self.packed
        words += [f"recompute {self.recompute}"] * (self.recompute != "none")
        return " ".join(words)


def batch(vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, targets and starts of documents (B, S); one sequence has no targets, another few.

    Documents begin at borders of ranks and beside them, and some are shorter than the convolution.
    """
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randint(0, vocab_size, (2, BATCH, LENGTH), generator=generator)
    targets[0, :5] = targets[3, 2:] = targets[5] = -100
    lengths = [[24], [6, 18], [5, 2, 17], [7, 5, 12], [1, 1, 22], [13, 11], [11, 2, 11], [23, 1]]
    ids = [[n for n, length in enumerate(row) for _ in range(length)] for row in lengths]
    return inputs, targets, starts_of_ids(torch.tensor(ids))


def plain_run(config: HybridConfig, packed: bool) -> Record:
    """Train the whole model on the whole batch with torch's own loss, clipping and AdamW."""
    model = HybridForCausalLM(config).double()
    initialise(ParameterTable.of(model).pieces(model), config, SEED)
    inputs, targets, starts = batch(config.vocab_size)
    documents = starts if packed else None
    return train_plainly(model, lambda: model(inputs, document_starts=documents), targets, LESSON)


def data_of(case: Case, topology: Topology) -> list[Tensor]:
    """A rank's ids and targets, and starts of documents where they are packed."""
    dp, cp = topology.axis("dp"), topology.axis("cp")
    wholes = batch(case.model.vocab_size)[: 3 if case.packed else 2]
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
        lambda: HybridForCausalLM(config),
        topology,
        sharding.plan(config, case.context),
        head=sharding.HEAD,
        tail=sharding.TAIL,
        pipeline=pipeline,
        precision=DOUBLE,
        regions=case.recompute,
    )
    initialise([*model.pieces(), *model.buffers()], config, SEED)
    runner = make_runner(
        model,
        pipeline,
        num_microbatches=BATCH // layout.dp // case.microbatch_size,
        microbatch_size=case.microbatch_size,
        sequence_length=LENGTH,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        dtype=DOUBLE.compute_dtype,
    )
    count = num_valid(batch(config.vocab_size)[1])
    return Job(model, runner, data_of(case, topology), count, LESSON)


def judge(case: Case, expected: Record) -> Verdict:
    """Run a case on this rank."""
    return testing.judge(make_job(case), expected)


def with_model(**changes: object) -> HybridConfig:
    """``MODEL`` with other values."""
    return replace(MODEL, **changes)  # type: ignore[arg-type]
