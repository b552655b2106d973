"""Which checkpoints of a run are kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fivefold.parallel_core.config import Config
from fivefold.parallel_core.errors import CheckpointError


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention(Config):
    """Which whole checkpoints stay when a newer one is whole; the others are removed.

    Attributes:
        last: how many of the newest.
        every: also those after a multiple of so many steps; None keeps none for that.
        best: also how many of those with the lowest ``metric``.
        metric: a number in the state that is saved with a checkpoint; those without it are not
            among the best.
    """

    last: int = 2
    every: int | None = None
    best: int = 0
    metric: str = "heldout_loss"

    def __post_init__(self) -> None:
        if self.last < 1:
            raise CheckpointError(f"keep={self.last} checkpoints; at least 1 must be kept")
        if self.every is not None and self.every < 1:
            raise CheckpointError(f"every={self.every} steps; it must be at least 1, or None")
        if self.best < 0:
            raise CheckpointError(f"best={self.best} checkpoints; it must be at least 0")

    def keeps(self, whole: Sequence[int], metric: Callable[[int], float | None]) -> set[int]:
        """The steps that stay.

        Args:
            whole: steps after which there is a whole checkpoint, oldest first.
            metric: the metric of one of them, or None.
        """
        kept = set(whole[-self.last :])
        if self.every is not None:
            kept |= {step for step in whole if step % self.every == 0}
        if self.best:
            scored = [(value, step) for step in whole if (value := metric(step)) is not None]
            kept |= {step for _, step in sorted(scored)[: self.best]}
        return kept
