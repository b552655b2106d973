"""Filling one rank's piece of a tensor from files that hold it under other names."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fivefold.parallel_core.box import Box
from fivefold.parallel_core.errors import CheckpointError
from fivefold.parallel_core.hub.reader import SafetensorsReader


@torch.no_grad()
def fill(
    tensor: Tensor,
    box: Box,
    shape: Sequence[int],
    sources: Iterable[tuple[str, tuple[int, ...]]],
    reader: SafetensorsReader,
) -> None:
    """Copy a box of a global tensor from disk into ``tensor``, in place and in its own dtype.

    A source ``(disk_name, index)`` says that ``global[index]`` is the disk tensor: ``()`` for the
    whole, ``(e,)`` for one expert of a stack, ``(e, 1)`` for the second of its two matrices. Only
    sources that meet the box are opened, and only the common slices are read.

    Args:
        tensor: what this rank holds, of shape ``box.size``, on any device.
        box: where that is in the global tensor.
        shape: shape of the global tensor.
        sources: together they cover the box, each element once.
        reader: the folder.

    Raises:
        CheckpointError: a disk tensor is missing or of another shape, the sources do not cover
            the box, or ``tensor`` does not have the box's shape.
    """
    shape = tuple(shape)
    if tuple(tensor.shape) != box.size:
        raise CheckpointError(f"cannot fill a tensor of {tuple(tensor.shape)} with box {box.size}")
    filled, names = 0, []
    for name, index in sources:
        names.append(name)
        part = Box(
            index + (0,) * (len(shape) - len(index)), (1,) * len(index) + shape[len(index) :]
        )
        common = part.intersect(box)
        if common.numel:
            _copy(tensor, common.within(box), name, len(index), common.within(part), shape, reader)
            filled += common.numel
    if filled != box.numel:
        raise CheckpointError(
            f"box at {box.offset} of size {box.size} in a tensor of {shape} has {box.numel} "
            f"elements, its sources hold {filled} of them: {', '.join(names[:4]) or 'no sources'}"
            f"{', ...' if len(names) > 4 else ''}"
        )


def _copy(
    tensor: Tensor,
    to: Box,
    name: str,
    indexed: int,
    source: Box,
    shape: tuple[int, ...],
    reader: SafetensorsReader,
) -> None:
    """Copy the box ``source`` of the disk tensor into the box ``to`` of ``tensor``.

    The first ``indexed`` dims of both boxes have size 1 and are no dims of the disk tensor.
    """
    if reader.shape(name) != shape[indexed:]:
        raise CheckpointError(
            f"{name!r} on disk has shape {reader.shape(name)}, the model needs {shape[indexed:]}"
        )
    target = tensor[to.offset[:indexed] + to.slices[indexed:]]
    target.copy_(reader.view(name, source.slices[indexed:]))
