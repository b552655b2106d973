"""The law of equality: training under a layout beside plain torch in one process."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fivefold.moe import MoEConfig, MoEForCausalLM, sharding
from fivefold.moe.dispatchers import DispatchConfig
from fivefold.moe.router_config import RouterConfig
from fivefold.parallel_core.build import ParallelModel, build, make_runner
from fivefold.parallel_core.context import take_held
from fivefold.parallel_core.data_parallel import Precision
from fivefold.parallel_core.data_parallel_config import DataParallelConfig
from fivefold.parallel_core.documents import starts_of_ids
from fivefold.parallel_core.gradients import clip, global_norm, sum_partial
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.parameters import ParameterTable, Piece, initialise
from fivefold.parallel_core.pipeline import Runner
from fivefold.parallel_core.pipeline_config import PipelineConfig
from fivefold.parallel_core.sequence_split import ContextConfig
from fivefold.parallel_core.topology import Topology
from fivefold.parallel_core.training.optimizer import AdamWConfig, ShardedAdamW
from fivefold.parallel_core.training.totals import Totals

SEED, BATCH, LENGTH, STEPS = 7, 8, 16, 3
CLIP, LEARNING_RATE = 0.5, 1e-2
ADAMW = AdamWConfig()
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


def num_valid(targets: Tensor) -> int:
    return int((targets != -100).sum())


def plain_run(config: MoEConfig, packed: bool = False, steps: int = STEPS) -> Record:
    """Train the whole model on the whole batch with torch's own loss, clipping and AdamW."""
    model, record = MoEForCausalLM(config).double(), Record()
    initialise(ParameterTable.of(model).pieces(model), model.initialisation, SEED)
    parameters = dict(model.named_parameters())
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
    inputs, targets = batch(config.vocab_size)
    model.side.weight = 1 / BATCH
    for step in range(steps):
        logits = model(inputs, document_starts=packed_starts() if packed else None)
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
        model.after_step(totals)
        side = {name: totals[name].item() / BATCH for name in LOSSES if name in totals}
        record.note(step, loss.item(), norm.item(), side)
    kept = (*parameters.items(), *model.named_buffers())
    record.parameters = {name: value.detach().clone() for name, value in kept}
    return record


@dataclass(kw_only=True)
class Job:
    """The model laid over the ranks, ready to train."""

    case: Case
    topology: Topology
    model: ParallelModel
    runner: Runner
    pieces: list[Piece]
    optimizer: ShardedAdamW

    def data(self) -> list[Tensor]:
        """This rank's ids and targets, and starts of documents where they are packed."""
        dp, cp = self.topology.axis("dp"), self.topology.axis("cp")
        wholes = batch(self.case.model.vocab_size) + (packed_starts(),) * self.case.packed
        mine = (whole.chunk(dp.size)[dp.rank] for whole in wholes)
        return [take_held(rows, cp, self.case.context.split) for rows in mine]

    def run(self) -> Record:
        """The same training as ``plain_run``; tensors are this rank's pieces."""
        record, count = Record(), num_valid(batch(self.case.model.vocab_size)[1])
        sums = Totals(self.topology.world)
        self.model.train()
        for step in range(self.case.steps):
            self.model.weigh_side_losses(1 / BATCH)
            inputs, targets, *starts = self.data()
            loss = self.runner.train(inputs, targets, 1 / count, *starts).item()
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
            totals = sums.sum(self.model.drain_side_outputs())
            self.model.after_step(totals)
            side = {name: totals[name].item() / BATCH for name in LOSSES if name in totals}
            record.note(step, world_sum(once) / count, norm.item(), side)
        kept = (*self.pieces, *self.model.buffers())
        record.parameters = {piece.name: piece.tensor.clone() for piece in kept}
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
    pieces = model.pieces()
    optimizer = ShardedAdamW(pieces, ADAMW)
    return Job(
        case=case, topology=topology, model=model, runner=runner, pieces=pieces, optimizer=optimizer
    )


def distances(job: Job, run: Record, expected: Record) -> Iterator[tuple[str, float]]:
    """Relative distance of every scalar and of every tensor on this rank from the reference."""
    for name, value in expected.scalars.items():
        yield name, abs(run.scalars[name] - value) / (abs(value) or 1.0)
    for kind in ("gradients", "parameters"):
        found, wholes = getattr(run, kind), getattr(expected, kind)
        buffers = job.model.buffers() if kind == "parameters" else []
        for piece in (*job.pieces, *buffers):
            if piece.box.numel:
                whole = wholes[piece.name]
                error = (found[piece.name] - whole[piece.box.slices]).abs().max()
                yield f"{kind}[{piece.name}]", (error / whole.abs().max()).item()


def num_counted(pieces: list[Piece]) -> Mapping[str, int]:
    """Elements of each parameter that this rank counts in sums over all ranks."""
    return {piece.name: piece.box.numel for piece in pieces if piece.counted}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one rank found: its distances, what it counts, and the scalars of its run."""

    distances: Mapping[str, float]
    counted: Mapping[str, int]
    scalars: Mapping[str, float]


def judge(case: Case, expected: Record) -> Verdict:
    """Run a case on this rank."""
    job = make_job(case)
    run = job.run()
    return Verdict(
        distances=dict(distances(job, run, expected)),
        counted=num_counted(job.pieces),
        scalars=run.scalars,
    )


def with_model(**changes: object) -> MoEConfig:
    """``MODEL`` with other values."""
    return replace(MODEL, **changes)  # type: ignore[arg-type]
