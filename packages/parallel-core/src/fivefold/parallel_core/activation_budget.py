"""Keeping a pipeline rank's activations within a budget of bytes, while it trains.

Korthikanti et al., arXiv 2205.05198, appendix C. Which microbatches are stored follows from the
schedule's order and from what one microbatch of each stage keeps, so it is the same on all ranks
that share a stage, and in every step but the first, in which a microbatch of each is weighed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.in_flight import Order
from fivefold.parallel_core.moving_window import Chunk, StageBytes, choose_stored, window_peak
from fivefold.parallel_core.recomputing import request_recomputation
from fivefold.parallel_core.weighing import Weighing

Agree = Callable[[Sequence[int]], Sequence[int]]
"""The largest of each number over the ranks that share this rank's stages."""


class ActivationBudget:
    """Decides for each microbatch of this rank's stages whether it is stored or recomputed.

    In the first step the first microbatch of each stage is stored and weighed, and the others are
    recomputed. From the second step on, as many as fit are stored (``choose_stored``). What layers
    keep is taken to be the same for every microbatch, which mixtures of experts meet about.

    The budget is for what autograd keeps between a microbatch's forward and its backward, the loss
    included. Backward itself needs more: the gradients, and one recomputed layer's activations.

    Args:
        budget: bytes.
        order: what this rank does in a step.
        parts: this rank's stages, by index; with layers recomputed on request.
        agree: makes sizes equal on ranks that must decide alike.

    Attributes:
        sizes: of each stage; empty until all have been weighed.
        stored: the microbatches that are stored in this step.
    """

    def __init__(self, budget: int, order: Order, parts: Mapping[int, nn.Module], agree: Agree):
        self.sizes: Mapping[int, StageBytes] = {}
        self._budget, self._order, self._agree = budget, order, agree
        self._weighings = {stage: Weighing(part) for stage, part in parts.items()}
        self._first: dict[int, Chunk] = {}
        for action in order:
            self._first.setdefault(action.stage, (action.stage, action.microbatch))
        self.stored: frozenset[Chunk] = frozenset(self._first.values())
        self._last: Chunk | None = None

    def start_step(self) -> None:
        """To be called before each training step."""
        if self._all_weighed:
            self._settle()
            self.stored = choose_stored(self._order, self.sizes, self._budget)

    @contextmanager
    def forward(self, stage: int, microbatch: int, inputs: Sequence[Any]) -> Iterator[None]:
        """What the forward of a microbatch runs inside; ``inputs`` are the step's own, if any."""
        if not torch.is_grad_enabled():
            yield
            return
        if self._all_weighed:
            self._settle()
        self._last = (stage, microbatch)
        with self._weigh(stage, inputs), request_recomputation(self._last not in self.stored):
            yield

    @contextmanager
    def loss(self, targets: Tensor) -> Iterator[None]:
        """What the loss of the microbatch that has just run forward runs inside."""
        if self._last is None or not torch.is_grad_enabled():
            yield
            return
        with self._weigh(self._last[0], [targets]):
            yield

    @contextmanager
    def _weigh(self, stage: int, given: Sequence[Any]) -> Iterator[None]:
        if self.sizes or self._last != self._first[stage]:
            yield
            return
        weighing = self._weighings[stage]
        # The step's data is there anyway, and not once for each microbatch.
        weighing.leave_out(given)
        with weighing:
            yield

    @property
    def _all_weighed(self) -> bool:
        return all(weighing.stored for weighing in self._weighings.values())

    def _settle(self) -> None:
        """Make one of the sizes of all stages, once, and see that the budget holds the least."""
        if self.sizes:
            return
        pairs = [(w.stored, w.recomputed) for w in self._weighings.values()]
        for weighing in self._weighings.values():
            weighing.let_go()
        agreed = iter(self._agree([number for pair in pairs for number in pair]))
        self.sizes = {
            stage: StageBytes(stored=stored, recomputed=recomputed)
            for stage, stored, recomputed in zip(self._weighings, agreed, agreed, strict=True)
        }
        everything = {(a.stage, a.microbatch) for a in self._order}
        least = window_peak(self._order, self.sizes, self.stored)
        if least > self._budget:
            most = window_peak(self._order, self.sizes, everything)
            raise ConfigError(
                f"activation_budget={self._budget:,} bytes cannot hold one stored microbatch of "
                f"stage {', '.join(map(str, self.sizes))} and the others recomputed, which takes "
                f"{least:,}; from {most:,} on nothing is recomputed"
            )
