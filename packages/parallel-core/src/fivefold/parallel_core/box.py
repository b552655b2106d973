"""A rectangular piece of a tensor: where it starts and how large it is, in every dim."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Box:
    """The half-open rectangle ``[offset, offset + size)`` of a larger tensor.

    What a rank holds of a parameter is always one box of the parameter's global tensor, so
    initialisation, file reading, checkpoints and export all speak in boxes.

    Args:
        offset: first index in every dim.
        size: extent in every dim; 0 anywhere means an empty box.
    """

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> "Box":
        """The box that covers a tensor of ``shape``."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index of this box in the tensor it is a piece of."""
        return tuple(slice(o, o + s) for o, s in zip(self.offset, self.size, strict=True))

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for s in self.size:
            count *= s
        return count

    def intersect(self, other: "Box") -> "Box":
        """The common part; a box with a zero size where there is none."""
        start = tuple(max(a, b) for a, b in zip(self.offset, other.offset, strict=True))
        stop = (
            min(a + m, b + n)
            for a, m, b, n in zip(self.offset, self.size, other.offset, other.size, strict=True)
        )
        return Box(start, tuple(max(e - s, 0) for s, e in zip(start, stop, strict=True)))

    def within(self, outer: "Box") -> "Box":
        """The same box in coordinates that start at ``outer``'s corner."""
        return Box(tuple(a - b for a, b in zip(self.offset, outer.offset, strict=True)), self.size)
