"""How a tensor is cut over the ranks that share one copy of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from fivefold.parallel_core.box import Box


def dim_to_cut(shape: Sequence[int], count: int) -> int:
    """The first dim that divides evenly; dim 0, padded, where none does."""
    return next((dim for dim, n in enumerate(shape) if n % count == 0 and n > 0), 0)


@dataclass(frozen=True, slots=True)
class Chunks:
    """A tensor of ``shape`` in ``count`` chunks along one dim, as ``torch.chunk`` cuts.

    Where the dim does not divide, the last chunks are smaller or empty; in messages they are
    padded to the size of the first.

    Attributes:
        shape: of the tensor, with at least one dim.
        count: number of chunks.
    """

    shape: tuple[int, ...]
    count: int

    @property
    def dim(self) -> int:
        """The dim that is cut."""
        return dim_to_cut(self.shape, self.count)

    @property
    def padded(self) -> int:
        """Elements of the first chunk, and of every chunk with its padding."""
        rows = -(-self.shape[self.dim] // self.count)
        return rows * prod(n for dim, n in enumerate(self.shape) if dim != self.dim)

    def box(self, index: int) -> Box:
        """Where a chunk lies in the tensor."""
        dim, length = self.dim, self.shape[self.dim]
        rows = -(-length // self.count)
        start = min(index * rows, length)
        offset, size = [0] * len(self.shape), list(self.shape)
        offset[dim], size[dim] = start, min(rows, length - start)
        return Box(tuple(offset), tuple(size))
