"""Training the toy under a layout, and how far that is from plain torch in one process."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import inf

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fivefold.parallel_core.build import ParallelModel, build, make_runner
from fivefold.parallel_core.context import take_held
from fivefold.parallel_core.data_parallel import Precision
from fivefold.parallel_core.data_parallel_config import DataParallelConfig
from fivefold.parallel_core.documents import starts_of_lengths
from fivefold.parallel_core.gradients import clip, global_norm, sum_partial
from fivefold.parallel_core.launcher import rejoin
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.parameters import ParameterTable, Piece, initialise
from fivefold.parallel_core.pipeline import Runner
from fivefold.parallel_core.pipeline_config import PipelineConfig
from fivefold.parallel_core.sequence_split import ContextConfig
from fivefold.parallel_core.styles import Style
from fivefold.parallel_core.topology import Topology
from fivefold.parallel_core.training.optimizer import AdamWConfig, ShardedAdamW

from .toy import HEAD, TAIL, Toy, ToyConfig, plan, rule

SEED, BATCH, LENGTH = 7, 8, 16
CLIP, LEARNING_RATE = 0.5, 1e-2
ADAMW = AdamWConfig()
DOUBLE = Precision(parameters="float64", compute="float64")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout of 8 ranks and what else differs from one process.

    Attributes:
        degrees: of ``Layout``.
        config: of the toy.
        context: form of attention and split of sequences over "cp".
        packed: several documents in each sequence.
        changes: entries of the plan to replace.
    """

    degrees: Mapping[str, int | str]
    config: ToyConfig = ToyConfig()  # noqa: RUF009
    sequence: bool = True
    stages_per_rank: int = 1
    schedule: str = ""
    activation_budget: int | None = None
    regions: str = "none"
    microbatch_size: int = 1
    precision: Precision = DOUBLE
    data: DataParallelConfig = DataParallelConfig()  # noqa: RUF009
    context: ContextConfig = ContextConfig()  # noqa: RUF009
    packed: bool = False
    changes: Mapping[str, Style] = field(default_factory=dict)

    def __str__(self) -> str:
        words = [f"{name}={degree}" for name, degree in self.degrees.items()]
        words += [f"recomputing {self.regions}"] * (self.regions != "none")
        words += ["whole-sequence"] * (not self.sequence)
        words += [self.schedule] * (self.schedule != "")
        words += [f"{self.stages_per_rank} stages a rank"] * (self.stages_per_rank > 1)
        words += [f"{self.microbatch_size} in a microbatch"] * (self.microbatch_size > 1)
        words += [f"{k}={v}" for k, v in self.data.to_dict().items() if v not in (None, "zero2")]
        words += list(self.context.to_dict().values()) * (self.context != ContextConfig())
        words += ["packed"] * self.packed
        words += ["tied"] * self.config.tied
        few = self.config.num_key_heads < self.config.num_heads
        words += [f"{self.config.num_key_heads} key heads"] * few
        return " ".join(words) or "data"


@dataclass(kw_only=True)
class Record:
    """What a run leaves: scalars of every step, gradients of the first, parameters of the last."""

    losses: list[float] = field(default_factory=list)
    side_losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)


def batch(vocab_size: int) -> tuple[Tensor, Tensor]:
    """Ids and targets (B, S); some targets are ignored, and all of one sequence."""
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randint(0, vocab_size, (2, BATCH, LENGTH), generator=generator)
    targets[0, :5] = targets[5] = -100
    return inputs, targets


DOCUMENTS = ([1, 5, 1, 7, 2], [3, 13], [16], [4, 4, 8])
"""Lengths of the documents in every fourth packed sequence."""


def packed_starts() -> Tensor:
    """Where each token's document starts, (B, S)."""
    rows = (torch.tensor([0, *torch.tensor(n).cumsum(0)]) for n in DOCUMENTS)
    return torch.cat([starts_of_lengths(row, LENGTH) for row in rows]).repeat(2, 1)


def one_by_one(model: Toy, inputs: Tensor) -> Tensor:
    """Logits of packed sequences, whose documents are put in one after the other."""
    rows = []
    for row, ids in enumerate(inputs):
        parts = ids.split(DOCUMENTS[row % len(DOCUMENTS)])
        rows.append(torch.cat([model(part[None]) for part in parts], 1))
    return torch.cat(rows)


def num_valid(targets: Tensor) -> int:
    """Targets that count."""
    return int((targets != -100).sum())


# ---- one process, plain torch --------------------------------------------------------------


def plain_model(config: ToyConfig, dtype: torch.dtype = torch.float64) -> Toy:
    """The whole toy with its first values."""
    model = Toy(config).to(dtype)
    initialise(ParameterTable.of(model).pieces(model), rule, SEED)
    return model


def plain_optimizer(model: Toy) -> torch.optim.AdamW:
    """torch's AdamW with what the paper of AdamW calls decoupled decay, on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    return torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=ADAMW.betas,
        eps=ADAMW.eps,
        weight_decay=ADAMW.weight_decay,
    )


def plain_run(config: ToyConfig, steps: int = 3, packed: bool = False) -> Record:
    """Train the whole toy on the whole batch."""
    model, record = plain_model(config), Record()
    optimizer = plain_optimizer(model)
    inputs, targets = batch(config.vocab_size)
    for step in range(steps):
        model.side.weight = 1 / BATCH
        loss = F.cross_entropy(
            (one_by_one(model, inputs) if packed else model(inputs)).flatten(0, 1),
            targets.flatten(),
            label_smoothing=config.label_smoothing,
            reduction="sum",
        ) / num_valid(targets)
        loss.backward()
        record.losses.append(loss.item())
        record.side_losses.append(sum(v.item() for v in model.side.drain().values()) / BATCH)
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
        record.norms.append(norm.item())
        if step == 0:
            record.gradients = {name: g.clone() for name, g in gradients.items()}
        for gradient in gradients.values():
            gradient.mul_(min(1.0, CLIP / norm.item()))
        optimizer.step()
        optimizer.zero_grad()
    record.parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    return record


# ---- any layout ----------------------------------------------------------------------------


@dataclass(kw_only=True)
class Job:
    """The toy laid over the ranks, ready to train."""

    case: Case
    topology: Topology
    model: ParallelModel
    runner: Runner
    pieces: list[Piece]
    optimizer: ShardedAdamW

    def data(self) -> list[Tensor]:
        """This rank's ids and targets, and starts of documents where they are packed."""
        dp, cp = self.topology.axis("dp"), self.topology.axis("cp")
        wholes = batch(self.case.config.vocab_size) + (packed_starts(),) * self.case.packed
        mine = (whole.chunk(dp.size)[dp.rank] for whole in wholes)
        return [take_held(rows, cp, self.case.context.split).contiguous() for rows in mine]

    def backward(self) -> tuple[float, float]:
        """Leave the step's gradients; the global loss and the global side loss."""
        self.model.weigh_side_losses(1 / BATCH)
        count = num_valid(batch(self.case.config.vocab_size)[1])
        inputs, targets, *starts = self.data()
        loss = self.runner.train(inputs, targets, 1 / count, *starts)
        sum_partial(self.pieces, self.topology)
        side = sum(v.item() for v in self.model.drain_side_outputs().values())
        return self.total(loss.item()) / count, world_sum(side) / BATCH

    def total(self, loss: float) -> float:
        """Sum of a loss over the ranks; it is the same on the tensor ranks, so one counts."""
        return world_sum(loss if self.topology.rank("tp") == 0 else 0.0)

    def update(self) -> float:
        """Clip and step; the global norm."""
        norm = global_norm(self.pieces, self.topology)
        clip(self.pieces, norm, CLIP)
        self.optimizer.step(LEARNING_RATE)
        return norm.item()

    def gradients(self) -> dict[str, Tensor]:
        """Copies of this rank's gradients without padding."""
        pairs = ((piece, piece.grad) for piece in self.pieces)
        return {p.name: p.trim(grad).clone() for p, grad in pairs if grad is not None}


def world_sum(value: float) -> float:
    """Sum over all ranks."""
    total = torch.tensor(value, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.item()


def fresh_topology(degrees: Mapping[str, int | str]) -> Topology:
    """A layout of all ranks in a world of its own, without the groups of those before."""
    if not dist.is_initialized():
        return Topology(Layout(1, **degrees))  # type: ignore[arg-type]
    rejoin()
    return Topology(Layout(dist.get_world_size(), **degrees))  # type: ignore[arg-type]


def make_job(case: Case, topology: Topology | None = None) -> Job:
    """Build, initialise, and make the optimizer.

    Without a topology the ranks join anew first, and jobs made before can send nothing any more.
    """
    topology = topology or fresh_topology(case.degrees)
    layout, config = topology.layout, case.config
    schedule = case.schedule or ("1F1B" if case.stages_per_rank == 1 else "Interleaved1F1B")
    pipeline = PipelineConfig(
        schedule=schedule,
        stages_per_rank=case.stages_per_rank,
        activation_budget=case.activation_budget,
    )
    model = build(
        lambda: Toy(config),
        topology,
        {**plan(config, sequence=case.sequence, context=case.context), **case.changes},
        head=HEAD,
        tail=TAIL,
        pipeline=pipeline,
        precision=case.precision,
        data_parallel=case.data,
        regions=case.regions,
    )
    model.initialise(rule, SEED)
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
    return Job(
        case=case,
        topology=topology,
        model=model,
        runner=runner,
        pieces=pieces,
        optimizer=ShardedAdamW(pieces, ADAMW),
    )


def parallel_run(job: Job, steps: int = 3) -> Record:
    """The same training as ``plain_run``; tensors are this rank's pieces."""
    record = Record()
    for step in range(steps):
        loss, side = job.backward()
        record.losses.append(loss)
        record.side_losses.append(side)
        if step == 0:
            record.gradients = job.gradients()
        record.norms.append(job.update())
    record.parameters = {piece.name: piece.tensor.clone() for piece in job.pieces}
    return record


def distances(job: Job, run: Record, reference: Record) -> Iterator[tuple[str, float]]:
    """Relative distance of every scalar and of every tensor on this rank from the reference."""
    for kind in ("losses", "side_losses", "norms"):
        for step, (a, b) in enumerate(
            zip(getattr(run, kind), getattr(reference, kind), strict=True)
        ):
            yield f"{kind}[{step}]", abs(a - b) / (abs(b) or 1.0)
    boxes = {piece.name: piece.box for piece in job.pieces}
    for kind in ("gradients", "parameters"):
        wholes, pieces = getattr(reference, kind), getattr(run, kind)
        # Shifting all keys changes no attention, so a key bias has a gradient of rounding errors.
        scale = 1e-3 * max(whole.abs().max().item() for whole in wholes.values())
        for name, box in boxes.items():
            if box.numel and name not in pieces:
                yield f"{kind}[{name}] is missing", inf
            elif box.numel:
                whole = wholes[name]
                error = (pieces[name] - whole[box.slices]).abs().max().item()
                yield f"{kind}[{name}]", error / max(whole.abs().max().item(), scale)


def worst(job: Job, run: Record, reference: Record) -> tuple[float, str]:
    """The largest distance on this rank, and of what."""
    return max((distance, what) for what, distance in distances(job, run, reference))
