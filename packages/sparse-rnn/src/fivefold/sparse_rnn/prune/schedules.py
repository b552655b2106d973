"""When to prune and how much.

A schedule says at which steps masks are made anew, and what of a matrix is then kept: a share
(``density_at``) or what is larger than a threshold (``threshold_at``).
"""

from dataclasses import dataclass
from typing import Protocol

from fivefold.parallel_core.config import Config
from fivefold.sparse_rnn.errors import SparseRNNInputError


class Schedule(Protocol):
    """What a pruner asks."""

    def due(self, step: int) -> bool:
        """Whether masks are made anew at this step, from 0."""

    def density_at(self, step: int) -> float | None:
        """Share of values that is kept; None where a threshold decides."""

    def threshold_at(self, step: int) -> float:
        """Magnitude up to which values are dropped; used where there is no density."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cubic(Config):
    """Fast at first, slow at the end: Zhu and Gupta, arXiv 1710.01878, equation 1.

    The share of zeros is ``final + (initial - final) (1 - (step - start) / (end - start))³``.

    Attributes:
        density: share of values that is kept in the end.
        start: first step.
        end: last step, from which on nothing changes.
        every: steps from one set of masks to the next.
        initial_density: share before the first step.
    """

    density: float
    start: int
    end: int
    every: int = 100
    initial_density: float = 1.0

    def __post_init__(self) -> None:
        _check(self.density, self.start, self.end, self.every)
        _check_density(self.initial_density)

    def due(self, step: int) -> bool:
        """Every so many steps, and at the end."""
        inside = self.start <= step <= self.end
        return inside and ((step - self.start) % self.every == 0 or step == self.end)

    def density_at(self, step: int) -> float:
        """The formula above."""
        whole = max(self.end - self.start, 1)
        left = 1 - min(max(step - self.start, 0), whole) / whole if self.end > self.start else 0.0
        return self.density + (self.initial_density - self.density) * left**3

    def threshold_at(self, step: int) -> float:
        """There is none: the density decides."""
        return 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class OneShot(Config):
    """All at once; training that follows is fine-tuning.

    Attributes:
        density: share of values that is kept.
        at: the step.
    """

    density: float
    at: int = 0

    def __post_init__(self) -> None:
        _check(self.density, self.at, self.at, 1)

    def due(self, step: int) -> bool:
        """Once."""
        return step == self.at

    def density_at(self, step: int) -> float:
        """Constant."""
        return self.density

    def threshold_at(self, step: int) -> float:
        """There is none: the density decides."""
        return 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Narang(Config):
    """A threshold that rises slowly and then faster: Narang et al., arXiv 1704.05119, section 3.

    Attributes:
        magnitude: q, what the threshold is meant to reach: the 90th percentile of a trained dense
            matrix's magnitudes keeps about a tenth.
        start: first step.
        ramp: from where it rises faster, usually a quarter of the way.
        end: last step.
        every: steps from one set of masks to the next.
        steeper: the second slope over the first, φ/θ, 1.5 to 2 in the paper.
    """

    magnitude: float
    start: int
    ramp: int
    end: int
    every: int = 100
    steeper: float = 1.5

    def __post_init__(self) -> None:
        _check(0.0, self.start, self.end, self.every)
        if not self.start <= self.ramp <= self.end or self.start == self.end:
            raise SparseRNNInputError(
                f"ramp is {self.ramp}; it must lie from start {self.start} to end {self.end}"
            )
        if self.magnitude <= 0 or self.steeper <= 0:
            raise SparseRNNInputError(
                f"magnitude {self.magnitude} and steeper {self.steeper} must be above 0"
            )

    def due(self, step: int) -> bool:
        """Every so many steps, and at the end."""
        inside = self.start <= step <= self.end
        return inside and ((step - self.start) % self.every == 0 or step == self.end)

    def density_at(self, step: int) -> None:
        """There is none: the threshold decides."""
        return

    def threshold_at(self, step: int) -> float:
        """``θ`` for each step up to ``ramp`` and ``φ`` from there; q is reached at the end."""
        slow, fast = self.ramp - self.start, self.end - self.ramp
        slope = self.magnitude / (slow + self.steeper * fast)
        passed = min(max(step - self.start, 0), slow + fast)
        return slope * (min(passed, slow) + self.steeper * max(passed - slow, 0))


def _check(density: float, start: int, end: int, every: int) -> None:
    _check_density(density)
    if not 0 <= start <= end or every < 1:
        raise SparseRNNInputError(
            f"pruning was asked from step {start} to {end}, every {every} steps; start must be 0 "
            "or more, end no less than start, every 1 or more"
        )


def _check_density(density: float) -> None:
    if not 0 <= density <= 1:
        raise SparseRNNInputError(f"density was asked to be {density}; it is a share from 0 to 1")
