"""What goes into the training loop and what comes out of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Report = Callable[[int, Mapping[str, float]], None]
"""Called on rank 0 with the number of finished steps and what was measured."""


class Batches(Protocol):
    """Training batches, addressed by step."""

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """This rank's inputs and targets of a step, (B, S) each.

        Where documents are packed also starts of documents, as ``Runner.train`` takes them.
        """
        ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call of ``Trainer.fit`` ended.

    Attributes:
        step: finished steps.
        finished: False where it was asked to stop before.
        heldout_loss: mean loss in nats a token on the held-out text, of the last evaluation.
    """

    step: int
    finished: bool
    heldout_loss: float | None
