"""The law of equality: training under a layout beside plain torch in one process."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fivefold.hybrid_ssm import HybridConfig, HybridForCausalLM, sharding
from fivefold.hybrid_ssm.train import initialise
from fivefold.parallel_core.build import ParallelModel, build, make_runner
from fivefold.parallel_core.context import take_held
from fivefold.parallel_core.data_parallel import Precision
from fivefold.parallel_core.documents import starts_of_ids
from fivefold.parallel_core.gradients import clip, global_norm, sum_partial
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.parameters import ParameterTable, Piece
from fivefold.parallel_core.pipeline_config import PipelineConfig
from fivefold.parallel_core.topology import Topology
from fivefold.parallel_core.training.optimizer import AdamWConfig, ShardedAdamW

SEED, BATCH, LENGTH, STEPS = 7, 8, 24, 2
CLIP, LEARNING_RATE = 0.5, 1e-2
ADAMW = AdamWConfig()
DOUBLE = Precision(parameters="float64", compute="float64")
LOSSES = ("aux_loss", "z_loss")

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


@dataclass(kw_only=True)
class Record:
    """What a run leaves: scalars of every step, gradients of the first, parameters of the last."""

    scalars: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)

    def note(self, step: int, loss: float, norm: float, side: Mapping[str, float]) -> None:
        """Keep the scalars of a step."""
        found = {"loss": loss, "norm": norm, **side}
        self.scalars |= {f"{name}[{step}]": value for name, value in found.items()}


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


def num_valid(targets: Tensor) -> int:
    return int((targets != -100).sum())


def plain_run(config: HybridConfig, packed: bool) -> Record:
    """Train the whole model on the whole batch with torch's own loss, clipping and AdamW."""
    model, record = HybridForCausalLM(config).double(), Record()
    initialise(ParameterTable.of(model).pieces(model), config, SEED)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters.values() if p.dim() > 1]},
            {"params": [p for p in parameters.values() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=ADAMW.betas,
        eps=ADAMW.eps,
        weight_decay=ADAMW.weight_decay,
    )
    inputs, targets, starts = batch(config.vocab_size)
    model.side.weight = 1 / BATCH
    for step in range(STEPS):
        logits = model(inputs, document_starts=starts if packed else None)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        if step == 0:
            record.gradients = {name: p.grad.clone() for name, p in parameters.items()}
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters.values()])
        for parameter in parameters.values():
            parameter.grad *= min(1.0, CLIP / norm.item())
        optimizer.step()
        optimizer.zero_grad()
        totals = model.side.drain()
        side = {name: totals[name].item() / BATCH for name in LOSSES if name in totals}
        record.note(step, loss.item(), norm.item(), side)
    record.parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    return record


@dataclass(kw_only=True)
class Job:
    """The model laid over the ranks, ready to train."""

    case: Case
    topology: Topology
    model: ParallelModel
    runner: Any
    pieces: list[Piece]
    optimizer: ShardedAdamW

    def data(self) -> list[Tensor]:
        """This rank's ids, targets and starts."""
        dp, cp = self.topology.axis("dp"), self.topology.axis("cp")
        return [
            take_held(whole.chunk(dp.size)[dp.rank], cp, self.case.context.split)
            for whole in batch(self.case.model.vocab_size)
        ]

    def run(self) -> Record:
        """The same training as ``plain_run``; tensors are this rank's pieces."""
        record, count = Record(), num_valid(batch(self.case.model.vocab_size)[1])
        self.model.train()
        inputs, targets, starts = self.data()
        for step in range(STEPS):
            self.model.weigh_side_losses(1 / BATCH)
            more = (starts,) if self.case.packed else ()
            loss = self.runner.train(inputs, targets, 1 / count, *more).item()
            sum_partial(self.pieces, self.topology)
            norm = global_norm(self.pieces, self.topology)
            if step == 0:
                grads = {p.name: p.grad for p in self.pieces if p.grad is not None}
                record.gradients = {
                    p.name: p.trim(grads[p.name]).clone() for p in self.pieces if p.name in grads
                }
            clip(self.pieces, norm, CLIP)
            self.optimizer.step(LEARNING_RATE)
            # The token loss is the same on all tensor ranks; side losses are each rank's own.
            once = loss if self.topology.rank("tp") == 0 else 0.0
            totals = self.model.drain_side_outputs()
            side = {n: world_sum(float(totals.get(n, 0.0))) / BATCH for n in LOSSES}
            record.note(step, world_sum(once) / count, norm.item(), side)
        record.parameters = {piece.name: piece.tensor.clone() for piece in self.pieces}
        return record


def world_sum(value: float) -> float:
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item()


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
    initialise(model.pieces(), config, SEED)
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
    pieces = model.pieces()
    optimizer = ShardedAdamW(pieces, ADAMW)
    return Job(
        case=case, topology=topology, model=model, runner=runner, pieces=pieces, optimizer=optimizer
    )


def distances(job: Job, run: Record, expected: Record) -> Iterator[tuple[str, float]]:
    """Relative distance of every scalar and of every tensor on this rank from the reference."""
    for name, value in expected.scalars.items():
        yield name, abs(run.scalars[name] - value) / abs(value)
    for kind in ("gradients", "parameters"):
        found, wholes = getattr(run, kind), getattr(expected, kind)
        for piece in job.pieces:
            if piece.box.numel and piece.name in wholes:
                whole = wholes[piece.name]
                error = (found[piece.name] - whole[piece.box.slices]).abs().max()
                yield f"{kind}[{piece.name}]", (error / whole.abs().max().clamp(min=1e-12)).item()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one rank found: its distances, what it counts, and the scalars of its run."""

    distances: Mapping[str, float]
    counted: Mapping[str, int]


def judge(case: Case, expected: Record) -> Verdict:
    """Run a case on this rank."""
    job = make_job(case)
    run = job.run()
    counted = {piece.name: piece.box.numel for piece in job.pieces if piece.counted}
    return Verdict(distances=dict(distances(job, run, expected)), counted=counted)


def with_model(**changes: object) -> HybridConfig:
    """``MODEL`` with other values."""
    return replace(MODEL, **changes)  # type: ignore[arg-type]
