"""Which tensors a save by all ranks together writes, and which rank sends what of them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fivefold.parallel_core.box import Box
from fivefold.parallel_core.errors import CheckpointError
from fivefold.parallel_core.hub.writer import Spec
from fivefold.parallel_core.together import Together


class HeldPiece(Protocol):
    """What a rank holds of a tensor: its name, its values, their box and the whole shape."""

    @property
    def name(self) -> str:
        """Global name."""
        ...

    @property
    def tensor(self) -> Tensor:
        """The values, of shape ``box.size``."""
        ...

    @property
    def box(self) -> Box:
        """Where they lie."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        ...


Sources = Callable[[str, tuple[int, ...]], Iterable[tuple[str, tuple[int, ...]]]]
"""Global name and shape to ``(disk name, index)`` pairs, as ``fill`` takes them: ``global[index]``
is the tensor on disk. No pairs leave a parameter out."""


@dataclass(frozen=True, slots=True)
class Part:
    """A box of a tensor on disk, and the rank that sends it."""

    rank: int
    box: Box


@dataclass(slots=True)
class OnDisk:
    """One tensor of a file.

    Attributes:
        spec: name on disk, shape, dtype.
        source: global name, and the box of the global tensor that it is.
        parts: what each rank sends of it, in coordinates of ``source``'s box.
    """

    spec: Spec
    source: tuple[str, Box]
    parts: list[Part]


def make_table(
    together: Together, pieces: Sequence[HeldPiece], sources: Sources, dtype: torch.dtype | None
) -> list[OnDisk]:
    """Every tensor on disk and who sends what of it; the same on every rank.

    Args:
        together: all ranks of the job.
        pieces: what this rank holds.
        sources: what the tensors are called on disk.
        dtype: on disk; None is each piece's own.

    Raises:
        CheckpointError: pieces do not cover a tensor.
    """
    mine = [(p.name, tuple(p.shape), dtype or p.tensor.dtype, p.box) for p in pieces]
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    holders: dict[str, dict[Box, int]] = {}
    for rank, found in enumerate(together.gather(mine)):
        for name, shape, kind, box in found:
            shapes[name] = (shape, kind)
            if box.numel:
                holders.setdefault(name, {}).setdefault(box, rank)
    table = []
    for name, (shape, kind) in shapes.items():
        for disk_name, index in sources(name, shape):
            rest = shape[len(index) :]
            source = Box(index + (0,) * len(rest), (1,) * len(index) + rest)
            found = [(r, source.intersect(box)) for box, r in holders.get(name, {}).items()]
            parts = [Part(r, common.within(source)) for r, common in found if common.numel]
            covered = sum(part.box.numel for part in parts)
            if covered != source.numel:
                raise CheckpointError(
                    f"{disk_name!r} of shape {rest} has {source.numel} elements, the ranks hold "
                    f"{covered} of them"
                )
            table.append(OnDisk((disk_name, rest, kind), (name, source), parts))
    return table
