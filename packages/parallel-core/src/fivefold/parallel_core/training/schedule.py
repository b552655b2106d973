"""The learning rate of every step."""

import math
from dataclasses import dataclass
from typing import Literal

from fivefold.parallel_core.config import Config
from fivefold.parallel_core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmupCosine(Config):
    """Linear warmup to a peak, then a decay; a pure function of the step.

    Attributes:
        learning_rate: the peak, reached at step ``warmup_steps`` (counted from 0).
        min_ratio: the last step's rate over the peak, for the kinds that decay.
        warmup_steps: steps below the peak; the first of them is not zero.
        total_steps: steps in all; later ones keep the last rate.
        kind: shape of the decay; "constant" stays at the peak, "wsd" (warmup, stable, decay; arXiv
            2404.06395) stays there until the last ``decay_steps`` and then falls in a line.
        decay_steps: of "wsd"; None is a fifth of ``total_steps``.

    >>> schedule = WarmupCosine(learning_rate=1.0, warmup_steps=3, total_steps=8, min_ratio=0.0)
    >>> [round(schedule.rate(step), 3) for step in range(8)]
    [0.25, 0.5, 0.75, 1.0, 0.854, 0.5, 0.146, 0.0]
    """

    learning_rate: float
    total_steps: int
    warmup_steps: int = 0
    min_ratio: float = 0.1
    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    decay_steps: int | None = None

    def __post_init__(self) -> None:
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ConfigError(f"learning_rate={self.learning_rate}; it must be positive and finite")
        if not 0 <= self.min_ratio <= 1:
            raise ConfigError(f"min_ratio={self.min_ratio}; it must be in [0, 1]")
        if not 0 <= self.warmup_steps < self.total_steps:
            raise ConfigError(
                f"warmup_steps={self.warmup_steps} of total_steps={self.total_steps}; "
                "it must be at least 0 and less than total_steps"
            )
        if self.decay_steps is not None and self.kind != "wsd":
            raise ConfigError(
                f"decay_steps={self.decay_steps} of the kind {self.kind!r}; only 'wsd' has them"
            )
        if self.kind == "wsd" and not 1 <= self._decay_steps <= self.total_steps:
            raise ConfigError(
                f"decay_steps={self.decay_steps} of total_steps={self.total_steps}; it must be at "
                "least 1 and at most total_steps"
            )

    def rate(self, step: int) -> float:
        """The learning rate of step ``step``, counted from 0: the one after ``step`` updates."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / (self.warmup_steps + 1)
        if self.kind == "wsd":
            return self._stable_rate(step)
        decaying = max(self.total_steps - 1 - self.warmup_steps, 1)
        done = min((step - self.warmup_steps) / decaying, 1.0)
        left = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}
        return self.learning_rate * (self.min_ratio + (1 - self.min_ratio) * left[self.kind])

    @property
    def _decay_steps(self) -> int:
        return max(self.total_steps // 5, 1) if self.decay_steps is None else self.decay_steps

    def _stable_rate(self, step: int) -> float:
        """The peak, then a line down to the minimum at the last step."""
        left = max(self.total_steps - 1 - step, 0) / self._decay_steps
        return self.learning_rate * (self.min_ratio + (1 - self.min_ratio) * min(left, 1.0))
