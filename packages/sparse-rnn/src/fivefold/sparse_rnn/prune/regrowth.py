"""Drop the smallest weights and grow others where the gradient is largest: RigL.

Evci et al., arXiv 1911.11134.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fivefold.parallel_core.config import Config
from fivefold.sparse_rnn.errors import SparseRNNInputError
from fivefold.sparse_rnn.prune.patterns import Pattern

# Less than any float32 and yet above zero, in float64.
_LEAST = 1e-300


@dataclass(frozen=True, kw_only=True, slots=True)
class RigL(Config):
    """When to regrow and how much.

    Attributes:
        start: first step, when the schedule has come to its density.
        end: last step, from which on masks stay.
        every: steps from one change to the next.
        fraction: share of the weights that changes place at first; it falls as a cosine.
    """

    start: int
    end: int
    every: int = 100
    fraction: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end or self.every < 1 or not 0 <= self.fraction <= 1:
            raise SparseRNNInputError(
                f"regrowth was asked from step {self.start} to {self.end}, every {self.every} "
                f"steps, of {self.fraction} of the weights; start must be below end, every at "
                "least 1, the share from 0 to 1"
            )

    def due(self, step: int) -> bool:
        """Whether masks change at this step; gradients must be seen in it."""
        return self.start <= step < self.end and (step - self.start) % self.every == 0

    def fraction_at(self, step: int) -> float:
        """``fraction / 2 (1 + cos(π t / T))``."""
        passed = (step - self.start) / (self.end - self.start)
        return self.fraction / 2 * (1 + math.cos(math.pi * passed))


def regrow(
    weight: Tensor, gradient: Tensor, mask: Tensor, fraction: float, pattern: Pattern
) -> Tensor:
    """The next mask (R, H), with as many values as before where the pattern allows.

    Args:
        weight: (R, H).
        gradient: (R, H), dense.
        mask: (R, H), what is kept now.
        fraction: of the kept values that may go.
        pattern: what masks must look like.
    """
    density, size = pattern.density_of(mask), weight.abs().double()
    stay = pattern.survivors(torch.where(mask, size + _LEAST, 0), density * (1 - fraction))
    # What stays comes first and of the rest the steepest; what was just dropped comes back only
    # where nothing else has a gradient, else there would be fewer and fewer.
    steep = gradient.abs().double().nan_to_num(0, 0, 0)
    last = (size / size.max().clamp(min=_LEAST) + 1) * _LEAST
    score = torch.where(mask & ~stay, last, steep.masked_fill(mask, 0))
    (grown,) = pattern.select([score.masked_fill(stay, torch.inf)], density)
    return grown
