"""Collectives with autograd: each is one direction forward and its conjugate backward.

``collective_types`` says how their inputs and outputs lie along an axis, and what they cost. On an
axis of one rank every function returns its input and sends nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fivefold.parallel_core._compat import all_gather_single, reduce_scatter_single
from fivefold.parallel_core.even import piece_along, piece_size
from fivefold.parallel_core.ledger import labelled
from fivefold.parallel_core.topology import Axis

__all__ = [
    "all_gather",
    "all_gather_v",
    "all_reduce",
    "all_to_all",
    "copy",
    "exchange_rows",
    "gather",
    "gather_along",
    "gather_rows",
    "piece_along",
    "piece_size",
    "reduce_scatter",
    "reduce_scatter_v",
    "scatter_sum_along",
    "scatter_sum_rows",
    "split",
    "start_shift",
    "sum_over",
]


# ---- plain collectives, without autograd ---------------------------------------------------


def sum_over(x: Tensor, axis: Axis) -> Tensor:
    """The sum of every rank's ``x``, in a new tensor; no gradient."""
    if axis.group is None:
        return x
    x = x.detach().clone(memory_format=torch.contiguous_format)
    with labelled(axis.name):
        dist.all_reduce(x, group=axis.group)
    return x


def gather_along(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Every rank's ``x`` laid one after the other along ``dim``; no gradient."""
    if axis.group is None:
        return x
    x = x.detach().movedim(dim, 0).contiguous()
    out = x.new_empty((axis.size * x.shape[0], *x.shape[1:]))
    with labelled(axis.name):
        all_gather_single(out, x, group=axis.group)
    return out.movedim(0, dim).contiguous()


def scatter_sum_along(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's piece along ``dim`` of the sum of every rank's ``x``; no gradient."""
    if axis.group is None:
        return x
    x = x.detach().movedim(dim, 0).contiguous()
    out = x.new_empty((piece_size(x.shape[0], axis), *x.shape[1:]))
    with labelled(axis.name):
        reduce_scatter_single(out, x, group=axis.group)
    return out.movedim(0, dim).contiguous()


def exchange_rows(
    x: Tensor, output_splits: Sequence[int], input_splits: Sequence[int], axis: Axis
) -> Tensor:
    """All-to-all of rows: ``input_splits[r]`` rows go to rank r, ``output_splits[r]`` come."""
    if axis.group is None:
        return x.detach()
    x = x.detach().contiguous()
    out = x.new_empty((sum(output_splits), *x.shape[1:]))
    with labelled(axis.name):
        dist.all_to_all_single(out, x, list(output_splits), list(input_splits), group=axis.group)
    return out


def gather_rows(x: Tensor, sizes: Sequence[int], axis: Axis) -> Tensor:
    """All-gather of ``sizes[r]`` rows from each rank r."""
    # gloo has no all-gather of uneven pieces; an all-to-all that sends one piece to all is one.
    repeated = x.detach().expand(axis.size, *x.shape).flatten(0, 1)
    return exchange_rows(repeated, sizes, [x.shape[0]] * axis.size, axis)


def scatter_sum_rows(x: Tensor, sizes: Sequence[int], axis: Axis) -> Tensor:
    """Sum over ranks of the ``sizes[rank]`` rows that belong to this rank."""
    mine = sizes[axis.rank]
    pieces = exchange_rows(x, [mine] * axis.size, sizes, axis)
    return pieces.view(axis.size, mine, *x.shape[1:]).sum(0)


def start_shift(x: Tensor, axis: Axis) -> Callable[[], Tensor]:
    """Send ``x`` to the next rank round the axis and begin to take the one before's.

    Returns:
        A function that waits and gives what came, of the shape of ``x``; ``x`` must not change
        before that.
    """
    x = x.detach().contiguous()
    if axis.group is None:
        return lambda: x
    out = torch.empty_like(x)
    after, before = ((axis.rank + step) % axis.size for step in (1, -1))
    with labelled(axis.name):
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, x, axis.ranks[after], axis.group),
                dist.P2POp(dist.irecv, out, axis.ranks[before], axis.group),
            ]
        )

    def wait() -> Tensor:
        for work in works:
            work.wait()
        return out

    return wait


# ---- with autograd -------------------------------------------------------------------------


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return sum_over(grads[0], ctx.axis), None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return sum_over(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return gather_along(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return scatter_sum_along(grads[0], ctx.axis, ctx.dim), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return scatter_sum_along(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return gather_along(grads[0], ctx.axis, ctx.dim), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return gather_along(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return piece_along(grads[0], ctx.axis, ctx.dim), None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return piece_along(x, axis, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return gather_along(grads[0], ctx.axis, ctx.dim), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, output_splits: list[int], input_splits: list[int], axis: Axis
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.axis = input_splits, output_splits, axis
        return exchange_rows(x, output_splits, input_splits, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return exchange_rows(grads[0], ctx.sent, ctx.received, ctx.axis), None, None, None


class _AllGatherV(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], axis: Axis) -> Tensor:
        ctx.sizes, ctx.axis = sizes, axis
        return gather_rows(x, sizes, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return scatter_sum_rows(grads[0], ctx.sizes, ctx.axis), None, None


class _ReduceScatterV(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], axis: Axis) -> Tensor:
        ctx.sizes, ctx.axis = sizes, axis
        return scatter_sum_rows(x, sizes, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return gather_rows(grads[0], ctx.sizes, ctx.axis), None, None


def copy(x: Tensor, axis: Axis) -> Tensor:
    """Identity forward, all-reduce backward (f of the paper): before a column-parallel layer."""
    return x if axis.size == 1 else _Copy.apply(x, axis)


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """All-reduce forward, identity backward (f̄): after a row-parallel layer."""
    return x if axis.size == 1 else _AllReduce.apply(x, axis)


def all_gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """All-gather along ``dim`` forward, reduce-scatter backward (g)."""
    return x if axis.size == 1 else _AllGather.apply(x, axis, dim)


def reduce_scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Reduce-scatter along ``dim`` forward, all-gather backward (ḡ)."""
    return x if axis.size == 1 else _ReduceScatter.apply(x, axis, dim)


def gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """All-gather forward, own piece backward: every rank goes on with the same whole tensor."""
    return x if axis.size == 1 else _Gather.apply(x, axis, dim)


def split(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Own piece forward, all-gather backward: from the same whole tensor to pieces."""
    return x if axis.size == 1 else _Split.apply(x, axis, dim)


def all_to_all(
    x: Tensor, output_splits: Sequence[int], input_splits: Sequence[int], axis: Axis
) -> Tensor:
    """Rows to the ranks they are for, and back again in backward.

    Args:
        x: (sum(input_splits), ...).
        output_splits: rows that come from each rank.
        input_splits: rows of ``x`` that go to each rank, in rank order.
        axis: the ranks.
    """
    if axis.size == 1:
        return x
    return _AllToAll.apply(x, list(output_splits), list(input_splits), axis)


def all_gather_v(x: Tensor, sizes: Sequence[int], axis: Axis) -> Tensor:
    """All-gather of unequal numbers of rows forward, reduce-scatter backward.

    Args:
        x: (sizes[rank], ...).
        sizes: rows that each rank holds.
        axis: the ranks.
    """
    return x if axis.size == 1 else _AllGatherV.apply(x, list(sizes), axis)


def reduce_scatter_v(x: Tensor, sizes: Sequence[int], axis: Axis) -> Tensor:
    """Reduce-scatter of unequal numbers of rows forward, all-gather backward.

    Args:
        x: (sum(sizes), ...), this rank's part of the sum.
        sizes: rows that each rank gets.
        axis: the ranks.
    """
    return x if axis.size == 1 else _ReduceScatterV.apply(x, list(sizes), axis)
