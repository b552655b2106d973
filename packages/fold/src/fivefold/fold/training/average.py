"""The moving average of the parameters, which is what is scored and published."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fivefold.parallel_core.checkpoint import TensorPart
from fivefold.parallel_core.parameters import Piece


class MovingAverage:
    """An average of what a rank updates, in the dtype that it is stored in.

    Args:
        pieces: what the rank holds; the average begins at their values.
    """

    def __init__(self, pieces: Sequence[Piece]):
        self._pieces = list(pieces)
        self.values: list[Tensor] = [piece.tensor.detach().clone() for piece in pieces]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Let the average be ``decay`` of itself and the rest of the parameters."""
        if self.values:
            current = [piece.tensor.detach() for piece in self._pieces]
            torch._foreach_lerp_(self.values, current, 1 - decay)

    def parts(self) -> dict[str, TensorPart]:
        """For checkpoints: ``ema.<name>``."""
        return {
            f"ema.{piece.name}": TensorPart(value, piece.box, piece.shape)
            for piece, value in zip(self._pieces, self.values, strict=True)
        }

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the parameters have the averages as values inside, and their own afterwards."""
        own = [piece.tensor.detach().clone() for piece in self._pieces]
        self._put(self.values)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for piece, value in zip(self._pieces, values, strict=True):
            piece.tensor.copy_(value)
