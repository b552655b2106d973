"""Running a step's microbatches, through pipeline stages where there are any."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import schedules

from fivefold.parallel_core.activation_budget import ActivationBudget
from fivefold.parallel_core.collectives import gather_along
from fivefold.parallel_core.data_parallel import (
    free_gathered,
    gather_mains,
    reduce_gradients,
    synchronise_last,
)
from fivefold.parallel_core.in_flight import orders_of
from fivefold.parallel_core.pipeline_config import ONE_STAGE, PipelineConfig, deal_layers
from fivefold.parallel_core.stage import Stage
from fivefold.parallel_core.tied import Twin
from fivefold.parallel_core.topology import Topology


def keep_stage(
    model: nn.Module,
    stage: int,
    num_stages: int,
    *,
    head: Sequence[str],
    tail: Sequence[str],
) -> nn.Module:
    """Cut a model down to one pipeline stage, in place; names stay global.

    Args:
        model: with its layers in an ``nn.ModuleDict`` called ``layers``, keyed by index.
        stage: index of the stage.
        num_stages: in the whole pipeline.
        head: names of the modules before the layers; the first stage has them.
        tail: names of the modules after the layers; the last stage has them.
    """
    stack = model.get_submodule("layers")
    keys = list(dict(stack.named_children()))
    mine = deal_layers(len(keys), num_stages)[stage]
    for index, key in enumerate(keys):
        if index not in mine:
            delattr(stack, key)
    for name in (*(head if stage > 0 else ()), *(tail if stage < num_stages - 1 else ())):
        setattr(model, name, None)
    return model


class Runner(ABC):
    """Runs the microbatches of a step forward and backward."""

    @abstractmethod
    def train(
        self, inputs: Tensor, targets: Tensor, scale: float, starts: Tensor | None = None
    ) -> Tensor:
        """Leave the gradient of ``scale`` × loss in the parameters.

        Args:
            inputs: (B, S) of this rank for all microbatches of the step.
            targets: (B, S).
            scale: 1 / (valid tokens of the global batch).
            starts: (B, S), where documents are packed: the position in its whole sequence at which
                each token's document starts. Every stage's modules get it as ``document_starts``.

        Returns:
            This rank's sum of token losses, unscaled; zero off the last stage.
        """

    @abstractmethod
    def evaluate(self, inputs: Tensor, targets: Tensor, starts: Tensor | None = None) -> Tensor:
        """The same sum without a backward pass."""


class LocalRunner(Runner):
    """All layers on this rank: microbatches one after the other.

    Args:
        model: called on (b, S) ids; its ``loss`` gives the sum over tokens.
        num_microbatches: in a step.
    """

    def __init__(self, model: nn.Module, num_microbatches: int):
        self.model, self.num_microbatches = model, num_microbatches

    def train(
        self, inputs: Tensor, targets: Tensor, scale: float, starts: Tensor | None = None
    ) -> Tensor:
        """See ``Runner.train``."""
        gather_mains(self.model)
        total = torch.zeros((), device=inputs.device)
        microbatches = list(self._microbatches(inputs, targets, starts))
        for i, microbatch in enumerate(microbatches):
            synchronise_last(self.model, i == len(microbatches) - 1)
            loss = self._loss(*microbatch)
            (loss * scale).backward()
            total = total + loss.detach()
        reduce_gradients(self.model)
        return total

    def evaluate(self, inputs: Tensor, targets: Tensor, starts: Tensor | None = None) -> Tensor:
        """See ``Runner.evaluate``."""
        gather_mains(self.model)
        with torch.no_grad():
            microbatches = self._microbatches(inputs, targets, starts)
            total = torch.stack([self._loss(*microbatch) for microbatch in microbatches]).sum()
        free_gathered(self.model)
        return total

    def _microbatches(
        self, inputs: Tensor, targets: Tensor, starts: Tensor | None
    ) -> Iterator[tuple[Tensor, ...]]:
        """Ids, targets and, where there are any, starts of documents of each microbatch."""
        whole = (inputs, targets, *_if_any(starts))
        return zip(*(x.chunk(self.num_microbatches) for x in whole), strict=True)

    def _loss(self, x: Tensor, y: Tensor, *starts: Tensor) -> Tensor:
        logits = self.model(x, **_documents(*starts))
        loss: Tensor = self.model.get_submodule("loss")(logits, y)
        return loss


def _if_any(starts: Tensor | None) -> tuple[Tensor, ...]:
    return () if starts is None else (starts,)


def _documents(*starts: Tensor) -> dict[str, Tensor]:
    """What a model is told of documents; nothing where there are none, as not all know them."""
    return dict(zip(("document_starts",), starts, strict=False))


def _example(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What crosses a border, without values; torch lays out its messages after it."""
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def _largest(numbers: Sequence[int], topology: Topology) -> list[int]:
    """The largest of each number over the ranks that share this rank's stages."""
    mine = torch.tensor([numbers], device=topology.device)
    found: list[int] = gather_along(mine, topology.axis("tp-dp-cp"), 0).amax(0).tolist()
    return found


def _quiet_schedules() -> None:
    """Keep torch's schedules from logging what they raise as well.

    When a rank dies, each of the others would log the whole order of its actions, hundreds of
    lines, above the one error that says what happened.
    """
    logging.getLogger("torch.distributed.pipelining.schedules").setLevel(logging.CRITICAL)


class PipelineRunner(Runner):
    """Stages of ``torch.distributed.pipelining`` over the "pp" axis.

    Args:
        parts: this rank's stages in order; part i is the stage that ``config.stage_index`` says.
        topology: the ranks.
        config: schedule.
        num_microbatches: in a step.
        ids: shape of a microbatch of ids on this rank.
        hidden: shape of what crosses a border.
        logits: shape of the last stage's output.
        dtype: of activations.
        twins: tied parameters of which this rank has both stages.

    Attributes:
        schedule: torch's.
        budget: what decides which microbatches are recomputed; None where nothing limits them.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        topology: Topology,
        config: PipelineConfig,
        num_microbatches: int,
        *,
        ids: tuple[int, ...],
        hidden: tuple[int, ...],
        logits: tuple[int, ...],
        dtype: torch.dtype,
        twins: Sequence[Twin] = (),
    ):
        _quiet_schedules()
        pp = topology.axis("pp")
        config.check(pp.size, num_microbatches)
        num_stages = pp.size * config.stages_per_rank
        stages: dict[int, Stage] = {}
        for i, part in enumerate(parts):
            index = config.stage_index(pp.rank, i, pp.size)
            stages[index] = Stage(
                part,
                index,
                num_stages,
                topology.device,
                takes=_example(ids, torch.int64) if index == 0 else _example(hidden, dtype),
                gives=_example(logits if index == num_stages - 1 else hidden, dtype),
                group=pp.group,
            )
        # V-shaped schedules have both ends on one rank.
        self.first = 0 in stages
        self._tail = stages[num_stages - 1].submod if num_stages - 1 in stages else None
        self._parts, self._twins, self._scale = parts, twins, 1.0
        kwargs: dict[str, Any] = {"loss_fn": self._loss, "scale_grads": False}
        make: Any = schedules.get_schedule_class(config.schedule)
        every = list(stages.values())
        of: Any = every[0] if config.schedule in ONE_STAGE else every
        self.schedule: Any = make(of, num_microbatches, **kwargs)
        self.budget: ActivationBudget | None = None
        if config.activation_budget is not None:
            self.budget = ActivationBudget(
                config.activation_budget,
                orders_of(self.schedule)[pp.rank],
                {index: stage.submod for index, stage in stages.items()},
                partial(_largest, topology=topology),
            )
            for stage in every:
                stage.around = self.budget.forward

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self._tail is None:
            raise RuntimeError("the loss is computed where the last stage is")
        with nullcontext() if self.budget is None else self.budget.loss(targets):
            loss: Tensor = self._tail.get_submodule("loss")(logits, targets) * self._scale
        return loss

    def train(
        self, inputs: Tensor, targets: Tensor, scale: float, starts: Tensor | None = None
    ) -> Tensor:
        """See ``Runner.train``."""
        self._scale = scale
        if self.budget is not None:
            self.budget.start_step()
        loss = self._run(self.schedule.step, inputs, targets, starts) / scale
        for part in self._parts:
            reduce_gradients(part)
        for twin in self._twins:
            twin.hand_over()
        return loss

    def evaluate(self, inputs: Tensor, targets: Tensor, starts: Tensor | None = None) -> Tensor:
        """See ``Runner.evaluate``."""
        self._scale = 1.0
        with torch.no_grad():
            total = self._run(self.schedule.eval, inputs, targets, starts)
        for part in self._parts:
            free_gathered(part)
        return total

    def _run(self, step: Any, inputs: Tensor, targets: Tensor, starts: Tensor | None) -> Tensor:
        for twin in self._twins:
            twin.refresh()
        for part in self._parts:
            gather_mains(part)
        losses: list[Tensor] = []
        args = (inputs,) if self.first else ()
        told: dict[str, Any] = {"return_outputs": False, **_documents(*_if_any(starts))}
        if self._tail is not None:
            told |= {"target": targets, "losses": losses}
        step(*args, **told)
        if not losses:
            return torch.zeros((), device=inputs.device)
        return torch.stack([loss.detach() for loss in losses]).sum()
