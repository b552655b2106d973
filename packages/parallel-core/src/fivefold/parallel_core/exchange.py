"""Tensors on their way to other ranks while this one does something else, forward and backward."""

from abc import ABC, abstractmethod
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
    return start(x, _Rows(list(output_splits), list(input_splits), axis))


class Journey(ABC):
    """One exchange there and, of gradients, one back."""

    def __init__(self) -> None:
        self._under_way: tuple[Tensor, Tensor, Any, bool] | None = None

    @abstractmethod
    def send(self, x: Tensor, back: bool) -> tuple[Tensor, Tensor, Any]:
        """Begin to exchange ``x``, without gradient.

        Returns:
            What is received into, what is sent, and the work to wait for.
        """

    def unpack(self, received: Tensor, back: bool) -> Tensor:
        """What the caller gets of what was received into."""
        return received

    def set_out(self, x: Tensor, *, back: bool = False) -> None:
        """Begin."""
        # What is being sent must live as long as the exchange.
        self._under_way = (*self.send(x.detach(), back), back)

    def arrive(self) -> Tensor:
        """Wait; what came."""
        if self._under_way is None:
            raise RuntimeError("rows that are there already were waited for again")
        received, _, work, back = self._under_way
        self._under_way = None
        work.wait()
        return self.unpack(received, back)


def start(x: Tensor, journey: Journey) -> Callable[[], Tensor]:
    """Let ``x`` set out; what is returned waits and gives what came, once.

    Gradients make the journey back, as in ``start_all_to_all``.
    """
    token = _Start.apply(x, journey)
    return lambda: _Wait.apply(token, journey)


class _Rows(Journey):
    """Rows for each rank."""

    def __init__(self, output_splits: list[int], input_splits: list[int], axis: Axis):
        super().__init__()
        self._there, self._back, self._axis = output_splits, input_splits, axis

    def send(self, x: Tensor, back: bool) -> tuple[Tensor, Tensor, Any]:
        to, of = (self._back, self._there) if back else (self._there, self._back)
        x = x.contiguous()
        out = x.new_empty((sum(to), *x.shape[1:]))
        with labelled(self._axis.name):
            work = dist.all_to_all_single(out, x, to, of, group=self._axis.group, async_op=True)
        return out, x, work


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, journey: Journey) -> Tensor:
        ctx.journey = journey
        journey.set_out(x)
        # Only ties the halves together; what comes has another shape than what goes.
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # What comes from _Wait only says that the gradients are on their way.
        return ctx.journey.arrive(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, journey: Journey) -> Tensor:
        ctx.journey = journey
        return journey.arrive()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.journey.set_out(grads[0], back=True)
        return grads[0].new_empty(0), None
