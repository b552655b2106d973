"""Dims of any length in one share for each rank, and what is sent where their layout changes.

Of a dim of L on t ranks the first L mod t hold ceil(L / t) and the others floor(L / t), which may
be nothing. Only what is gathered is padded, on its way, to ceil(L / t) each, because not every
backend gathers unequal parts; an all-to-all sends no padding.

Lengths of whole dims are arguments because a rank sees only its own share.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ._compat import all_gather_single, reduce_scatter_single
from .exchange import Journey, start
from .ledger import labelled
from .topology import Axis


def share_sizes(length: int, num_ranks: int) -> list[int]:
    """How much of a dim each rank holds.

    >>> share_sizes(30, 4)
    [8, 8, 7, 7]
    >>> share_sizes(2, 3)
    [1, 1, 0]
    """
    least, rest = divmod(length, num_ranks)
    return [least + (rank < rest) for rank in range(num_ranks)]


def share_along(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's share of ``x``, whole along ``dim``: a view; nothing is sent."""
    sizes = share_sizes(x.shape[dim], axis.size)
    return x.narrow(dim, sum(sizes[: axis.rank]), sizes[axis.rank])


def split_shares(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Own share forward, all-gather backward: from the same whole tensor to shares."""
    return x if axis.size == 1 else _Split.apply(x, axis, dim)


def gather_shares(x: Tensor, axis: Axis, dim: int, length: int) -> Tensor:
    """All-gather forward, own share backward: every rank goes on with the same whole tensor.

    Args:
        x: this rank's share along ``dim``.
        axis: the ranks.
        dim: that is shared.
        length: of the whole dim.
    """
    return x if axis.size == 1 else _Gather.apply(x, axis, dim, length)


def start_gather(x: Tensor, axis: Axis, dim: int, length: int) -> Callable[[], Tensor]:
    """Begin to all-gather; in backward a reduce-scatter, begun and awaited likewise.

    For what each rank uses in another way, so that its gradient is a part of the sum.

    Args:
        x: this rank's share along ``dim``; must not change before all is there.
        axis: the ranks.
        dim: that is shared.
        length: of the whole dim.

    Returns:
        A function that waits and gives the whole tensor; to be called once. Ranks must start and
        await their exchanges in the same order.
    """
    return (lambda: x) if axis.size == 1 else start(x, _Gathering(axis, dim, length))


def start_switch(
    x: Tensor, axis: Axis, *, gather_dim: int, split_dim: int, length: int
) -> Callable[[], Tensor]:
    """Begin to share another dim than before, by an all-to-all; in backward the other way round.

    Args:
        x: this rank's share along ``gather_dim``, whole along ``split_dim``; must not change before
            the other share is there.
        axis: the ranks.
        gather_dim: that will be whole.
        split_dim: that will be shared.
        length: of the whole ``gather_dim``.

    Returns:
        A function that waits and gives the share along ``split_dim``; to be called once. Ranks must
        start and await their exchanges in the same order.
    """
    if axis.size == 1:
        return lambda: x
    dims = (gather_dim % x.dim(), split_dim % x.dim())
    return start(x, _Switching(axis, dims, (length, x.shape[split_dim])))


class _Gathering(Journey):
    """All shares to all ranks; of gradients, the sum of each share to its rank."""

    def __init__(self, axis: Axis, dim: int, length: int):
        super().__init__()
        self._axis, self._dim = axis, dim
        self._sizes = share_sizes(length, axis.size)

    def send(self, x: Tensor, back: bool) -> tuple[Tensor, Tensor, Any]:
        x = x.movedim(self._dim, 0)
        shape = (self._sizes[0], *x.shape[1:])
        whole = x.new_empty((self._axis.size, *shape))
        flat = whole.flatten(0, 1)
        with labelled(self._axis.name):
            if back:
                for row, part in zip(whole, x.split(self._sizes), strict=True):
                    _fill(row, part)
                received = x.new_empty(shape)
                work = reduce_scatter_single(received, flat, self._axis.group, async_op=True)
                return received, whole, work
            mine = x.contiguous()
            if len(x) < len(whole[0]):
                _fill(mine := x.new_empty(shape), x)
            return whole, mine, all_gather_single(flat, mine, self._axis.group, async_op=True)

    def unpack(self, received: Tensor, back: bool) -> Tensor:
        if back:
            return received[: self._sizes[self._axis.rank]].movedim(0, self._dim)
        if self._sizes[0] == self._sizes[-1]:
            return received.flatten(0, 1).movedim(0, self._dim)
        parts = [row[:size] for row, size in zip(received, self._sizes, strict=True)]
        return torch.cat(parts).movedim(0, self._dim)


def _fill(row: Tensor, part: Tensor) -> None:
    """Copy a share to where there is room for the largest; the rest is zero."""
    row[: len(part)].copy_(part)
    row[len(part) :].zero_()


class _Switching(Journey):
    """A share of one dim for a share of another."""

    def __init__(self, axis: Axis, dims: tuple[int, int], lengths: tuple[int, int]):
        super().__init__()
        self._axis, self._dims = axis, dims
        self._sizes = tuple(share_sizes(length, axis.size) for length in lengths)
        self._coming: list[list[int]] = []

    def send(self, x: Tensor, back: bool) -> tuple[Tensor, Tensor, Any]:
        gather, split = (1, 0) if back else (0, 1)
        parts = x.split(self._sizes[split], self._dims[split])
        self._coming = [list(parts[self._axis.rank].shape) for _ in parts]
        for shape, size in zip(self._coming, self._sizes[gather], strict=True):
            shape[self._dims[gather]] = size
        to, of = [prod(shape) for shape in self._coming], [part.numel() for part in parts]
        sent, received = x.new_empty(sum(of)), x.new_empty(sum(to))
        for room, part in zip(sent.split(of), parts, strict=True):
            room.view(part.shape).copy_(part)
        with labelled(self._axis.name):
            work = dist.all_to_all_single(
                received, sent, to, of, group=self._axis.group, async_op=True
            )
        return received, sent, work

    def unpack(self, received: Tensor, back: bool) -> Tensor:
        parts = received.split([prod(shape) for shape in self._coming])
        shaped = [part.view(shape) for part, shape in zip(parts, self._coming, strict=True)]
        return torch.cat(shaped, self._dims[1 if back else 0])


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.gathering = _Gathering(axis, dim, x.shape[dim])
        return share_along(x, axis, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.gathering.set_out(grads[0])
        return ctx.gathering.arrive(), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int, length: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        gathering = _Gathering(axis, dim, length)
        gathering.set_out(x)
        return gathering.arrive()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return share_along(grads[0], ctx.axis, ctx.dim), None, None, None
