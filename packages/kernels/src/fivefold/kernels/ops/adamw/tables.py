"""Tables of addresses and of pieces, through which one launch reaches hundreds of tensors.

A table is made once and found again by its content: while addresses stay, nothing is sent to the
device, and there is nothing to refresh when they change. The device is never waited for.

Legend: T tensors, L lists of them, C pieces.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

# L times T of them.
Numbers = tuple[tuple[int, ...], ...]

# Gradients that are made anew in each step tend to come back to the same few places.
_KEPT = 64


def addresses(lists: Sequence[list[Tensor]]) -> Numbers:
    """Where tensors begin; zeros for a list that is empty.

    Args:
        lists: the first is not empty; each has T tensors or none.
    """
    none = (0,) * len(lists[0])
    return tuple(tuple(map(Tensor.data_ptr, each)) or none for each in lists)


def sizes(tensors: list[Tensor]) -> tuple[int, ...]:
    """Numbers of values."""
    return tuple(map(Tensor.numel, tensors))


def table(numbers: Numbers, device: torch.device) -> Tensor:
    """The numbers on a device, int64 (L, T)."""
    return _table(numbers, device, _stream(device))


def pieces(
    starts: Numbers, numels: tuple[int, ...], length: int, device: torch.device
) -> list[tuple[bool, Tensor]]:
    """The pieces of tensors that begin at multiples of 16 bytes in all lists, and of the others.

    Args:
        starts: addresses.
        numels: numbers of values of the T tensors.
        length: values in a piece; the last of a tensor has what remains.
        device: where the pieces are needed.

    Returns:
        Whether 16 bytes may be moved at once, and int64 (C, 2): the tensor and the first value of
        each piece. No entry where there are no pieces.
    """
    return _pieces(_aligned(starts), numels, length, device, _stream(device))


@lru_cache(maxsize=_KEPT)
def _aligned(starts: Numbers) -> tuple[bool, ...]:
    return tuple(not any(each % 16 for each in column) for column in zip(*starts, strict=True))


@lru_cache(maxsize=_KEPT)
def _pieces(
    aligned: tuple[bool, ...],
    numels: tuple[int, ...],
    length: int,
    device: torch.device,
    stream: int,
) -> list[tuple[bool, Tensor]]:
    found = []
    for kind in (True, False):
        chosen = [index for index, each in enumerate(aligned) if each == kind]
        counts = torch.tensor([-(-numels[index] // length) for index in chosen], dtype=torch.int64)
        firsts = counts.cumsum(0) - counts
        tensor = torch.tensor(chosen, dtype=torch.int64).repeat_interleave(counts)
        within = torch.arange(len(tensor)) - firsts.repeat_interleave(counts)
        if len(tensor):
            found.append((kind, _sent(torch.stack((tensor, within * length), 1), device)))
    return found


@lru_cache(maxsize=_KEPT)
def _table(numbers: Numbers, device: torch.device, stream: int) -> Tensor:
    return _sent(torch.tensor(numbers, dtype=torch.int64), device)


def _sent(values: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def _stream(device: torch.device) -> int:
    """A table may be used on the stream alone that it was sent on: another would not wait."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
