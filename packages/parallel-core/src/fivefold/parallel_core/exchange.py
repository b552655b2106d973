"""Rows on their way to other ranks while this one does something else, forward and backward."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .ledger import labelled
from .topology import Axis


def start_all_to_all(
    x: Tensor, output_splits: Sequence[int], input_splits: Sequence[int], axis: Axis
) -> Callable[[], Tensor]:
    """``collectives.all_to_all`` in two halves, with room for other work between them.

    In backward the rows' gradients set out where the forward waited and are waited for where it set
    out, so the gradients of what was computed between the halves are computed between them too.
    Ranks must start and await their exchanges in the same order.

    Args:
        x: (sum(input_splits), ...); must not change before the rows are there.
        output_splits: rows that come from each rank.
        input_splits: rows of ``x`` that go to each rank, in rank order.
        axis: the ranks.

    Returns:
        A function that waits for the rows and gives them; to be called once.
    """
    if axis.size == 1:
        return lambda: x
    journey = _Journey(list(output_splits), list(input_splits), axis)
    coming = _Start.apply(x, journey)
    return lambda: _Wait.apply(coming, journey)


class _Journey:
    """One exchange there and, of gradients, one back."""

    def __init__(self, output_splits: list[int], input_splits: list[int], axis: Axis):
        self._there, self._back, self._axis = output_splits, input_splits, axis
        self._under_way: tuple[Tensor, Tensor, Any] | None = None

    def set_out(self, x: Tensor, *, back: bool = False) -> Tensor:
        """Begin; the tensor that the rows will be in."""
        to, of = (self._back, self._there) if back else (self._there, self._back)
        x = x.detach().contiguous()
        out = x.new_empty((sum(to), *x.shape[1:]))
        with labelled(self._axis.name):
            work = dist.all_to_all_single(out, x, to, of, group=self._axis.group, async_op=True)
        # What is being sent must live as long as the exchange.
        self._under_way = (out, x, work)
        return out

    def arrive(self) -> Tensor:
        """Wait; the rows."""
        if self._under_way is None:
            raise RuntimeError("rows that are there already were waited for again")
        out, _, work = self._under_way
        self._under_way = None
        work.wait()
        return out


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, journey: _Journey) -> Tensor:
        ctx.journey = journey
        return journey.set_out(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # What comes from _Wait only says that the gradients are on their way.
        return ctx.journey.arrive(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coming: Tensor, journey: _Journey) -> Tensor:
        ctx.journey = journey
        rows = journey.arrive()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.journey.set_out(grads[0], back=True)
        return grads[0], None
