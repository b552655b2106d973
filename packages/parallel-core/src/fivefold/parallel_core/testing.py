"""The law of equality, for tests of models: training under a layout beside plain torch.

A test makes its model twice: whole, for ``train_plainly`` with torch's own loss, clipping and
AdamW, and laid over the ranks, for ``Job.run`` with this package's. ``distances`` says how far they
are from each other.

Legend: B sequences of the global batch, S tokens of a sequence, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fivefold.parallel_core.build import ParallelModel
from fivefold.parallel_core.gradients import clip, global_norm, sum_partial
from fivefold.parallel_core.pipeline import Runner
from fivefold.parallel_core.training.optimizer import AdamWConfig, ShardedAdamW
from fivefold.parallel_core.training.totals import Totals

IGNORED = -100
"""The target that counts as no token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesson:
    """How both are trained.

    Attributes:
        num_sequences: B.
        steps: on the same batch.
        losses: names of the side outputs to compare.
        clip: largest global norm of the gradient.
        learning_rate: of all steps.
        adamw: constants.
    """

    num_sequences: int
    steps: int
    losses: tuple[str, ...] = ()
    clip: float = 0.5
    learning_rate: float = 1e-2
    adamw: AdamWConfig = field(default_factory=AdamWConfig)

    def sides(self, totals: Mapping[str, Tensor]) -> dict[str, float]:
        """Side losses of a sequence."""
        return {n: totals[n].item() / self.num_sequences for n in self.losses if n in totals}


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


def num_valid(targets: Tensor) -> int:
    """Targets that count."""
    return int((targets != IGNORED).sum())


def plain_adamw(parameters: Mapping[str, nn.Parameter], lesson: Lesson) -> torch.optim.AdamW:
    """Torch's AdamW, which decays matrices and not vectors."""
    matrices = [p for p in parameters.values() if p.dim() > 1]
    vectors = [p for p in parameters.values() if p.dim() <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=lesson.learning_rate,
        betas=lesson.adamw.betas,
        eps=lesson.adamw.eps,
        weight_decay=lesson.adamw.weight_decay,
    )


def train_plainly(
    model: Any, logits: Callable[[], Tensor], targets: Tensor, lesson: Lesson
) -> Record:
    """Train the whole model on the whole batch.

    Args:
        model: with its first values, and ``side`` outputs.
        logits: runs it, (B, S, V).
        targets: (B, S).
        lesson: how.
    """
    record = Record()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = plain_adamw(parameters, lesson)
    model.side.weight = 1 / lesson.num_sequences
    for step in range(lesson.steps):
        loss = F.cross_entropy(logits().flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        loss.backward()
        gradients = {name: p.grad for name, p in parameters.items()}
        if step == 0:
            record.gradients = {name: grad.clone() for name, grad in gradients.items()}
        norm = torch.nn.utils.get_total_norm(list(gradients.values()))
        for gradient in gradients.values():
            gradient *= min(1.0, lesson.clip / norm.item())
        optimizer.step()
        optimizer.zero_grad()
        totals = model.side.drain()
        if hasattr(model, "after_step"):
            model.after_step(totals)
        record.note(step, loss.item(), norm.item(), lesson.sides(totals))
    kept = (*model.named_parameters(), *model.named_buffers())
    record.parameters = {name: value.detach().clone() for name, value in kept}
    return record


class Job:
    """A model laid over the ranks, ready to be trained.

    Args:
        model: this rank's part, with its first values.
        runner: of its microbatches.
        batch: this rank's ids and targets, and starts of documents where they are packed.
        count: targets of the whole batch that count.
        lesson: how it is trained.
    """

    def __init__(
        self,
        model: ParallelModel,
        runner: Runner,
        batch: list[Tensor],
        count: int,
        lesson: Lesson,
    ):
        self.model, self.runner, self.batch = model, runner, batch
        self.count, self.lesson, self.topology = count, lesson, model.topology
        self.pieces = model.pieces()
        self.optimizer = ShardedAdamW(self.pieces, lesson.adamw)

    def run(self) -> Record:
        """The same training as ``train_plainly``; tensors are this rank's pieces."""
        record, sums = Record(), Totals(self.topology.world)
        self.model.train()
        for step in range(self.lesson.steps):
            self.model.weigh_side_losses(1 / self.lesson.num_sequences)
            inputs, targets, *starts = self.batch
            loss = self.runner.train(inputs, targets, 1 / self.count, *starts)
            sum_partial(self.pieces, self.topology)
            norm = global_norm(self.pieces, self.topology)
            if step == 0:
                record.gradients = self.gradients()
            clip(self.pieces, norm, self.lesson.clip)
            self.optimizer.step(self.lesson.learning_rate)
            # The token loss is the same on all tensor ranks; side losses are each rank's own.
            once = loss.double() * (self.topology.rank("tp") == 0)
            totals = sums.sum({"loss": once, **self.model.drain_side_outputs()})
            mean = totals.pop("loss").item() / self.count
            self.model.after_step(totals)
            record.note(step, mean, norm.item(), self.lesson.sides(totals))
        kept = (*self.pieces, *self.model.buffers())
        record.parameters = {piece.name: piece.tensor.clone() for piece in kept}
        return record

    def gradients(self) -> dict[str, Tensor]:
        """Copies of this rank's gradients without padding."""
        pairs = ((piece, piece.grad) for piece in self.pieces)
        return {p.name: p.trim(grad).clone() for p, grad in pairs if grad is not None}


def distances(job: Job, run: Record, expected: Record) -> Iterator[tuple[str, float]]:
    """Relative distance of every scalar and of every tensor on this rank from the plain run."""
    for name, value in expected.scalars.items():
        yield name, abs(run.scalars[name] - value) / (abs(value) or 1.0)
    for kind in ("gradients", "parameters"):
        found, wholes = getattr(run, kind), getattr(expected, kind)
        for piece in (*job.pieces, *job.model.buffers()):
            # What is not trained has no gradient; of the rest nothing may be missing on any side.
            untrained = kind == "gradients" and not piece.parameter.requires_grad
            if piece.box.numel and not untrained:
                whole = wholes[piece.name]
                error = (found[piece.name] - whole[piece.box.slices]).abs().max()
                yield f"{kind}[{piece.name}]", (error / whole.abs().max().clamp(min=1e-12)).item()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one rank found.

    Attributes:
        distances: see ``distances``.
        counted: elements of each parameter that this rank counts in sums over all ranks.
        scalars: of its run.
    """

    distances: Mapping[str, float]
    counted: Mapping[str, int]
    scalars: Mapping[str, float]


def judge(job: Job, expected: Record) -> Verdict:
    """Train on this rank, and compare."""
    run = job.run()
    return Verdict(
        distances=dict(distances(job, run, expected)),
        counted={piece.name: piece.box.numel for piece in job.pieces if piece.counted},
        scalars=run.scalars,
    )
