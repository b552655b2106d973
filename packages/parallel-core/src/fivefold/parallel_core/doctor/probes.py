"""One call of each collective that this package uses, and what its result must be."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from fivefold.parallel_core import collectives
from fivefold.parallel_core.topology import Axis

DTYPES = (torch.float32, torch.bfloat16, torch.int64)

_LATE = 0.05  # seconds that the first rank of a group keeps the others waiting at a barrier
# Whole numbers up to these are exact, and so is every sum below whatever its order.
_EXACT = {torch.float32: 1 << 24, torch.bfloat16: 1 << 8, torch.int64: 1 << 40}


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a collective.

    Attributes:
        run: the call; gives its result.
        expected: what the result must be.
        timed: what to time where it is not ``run``.
    """

    run: Callable[[], Tensor]
    expected: Tensor
    timed: Callable[[], object] | None = None


@dataclass(frozen=True, slots=True)
class Values:
    """What each rank brings to a check: numbers that depend on the rank and on the position.

    Attributes:
        axis: the ranks that take part.
        dtype: of the numbers.
        device: where they live.
        rows: of each rank's piece of the whole.
    """

    axis: Axis
    dtype: torch.dtype
    device: torch.device
    rows: int

    @classmethod
    def of_size(cls, axis: Axis, dtype: torch.dtype, device: torch.device, nbytes: int) -> "Values":
        """Values whose whole has ``nbytes`` bytes, rounded to equal pieces of a row or more."""
        return cls(axis, dtype, device, max(1, nbytes // dtype.itemsize // axis.size))

    def exact(self, index: int, rows: int | None = None) -> Tensor:
        """The numbers of the rank at ``index`` of the axis, as integers; default: of a whole."""
        # In bfloat16, of many ranks some bring zeros, so that no sum grows beyond what is exact.
        givers = min(self.axis.size, 128)
        turns = -(-self.axis.size // givers)
        at = torch.arange(self.axis.size * self.rows if rows is None else rows)
        rank = self.axis.ranks[index]
        mixed = ((at + 1) * 2654435761 + (rank + 1) * 97003499) >> 11
        return (mixed % (_EXACT[self.dtype] // givers)) * ((at + index) % turns == 0)

    def brought(self, index: int, rows: int | None = None) -> Tensor:
        """The numbers of the rank at ``index``, as it brings them."""
        return self.cast(self.exact(index, rows))

    def cast(self, x: Tensor) -> Tensor:
        """``x`` in the dtype and on the device of these values."""
        return x.to(self.device, self.dtype)

    def total(self) -> Tensor:
        """The sum of all wholes, as integers."""
        return reduce(torch.add, map(self.exact, range(self.axis.size)))

    def greatest(self) -> Tensor:
        """The maximum of all wholes, as integers."""
        return reduce(torch.maximum, map(self.exact, range(self.axis.size)))


def _all_reduce(values: Values) -> Call:
    x = values.brought(values.axis.rank)
    return Call(lambda: collectives.sum_over(x, values.axis), values.cast(values.total()))


def _all_reduce_max(values: Values) -> Call:
    axis, x = values.axis, values.brought(values.axis.rank)

    def run() -> Tensor:
        top = x.clone()
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=axis.group)
        return top

    return Call(run, values.cast(values.greatest()))


def _all_gather(values: Values) -> Call:
    axis, rows = values.axis, values.rows
    x = values.brought(axis.rank, rows)
    whole = torch.cat([values.brought(i, rows) for i in range(axis.size)])
    return Call(lambda: collectives.gather_along(x, axis, 0), whole)


def _reduce_scatter(values: Values) -> Call:
    axis, x = values.axis, values.brought(values.axis.rank)
    piece = values.total().chunk(axis.size)[axis.rank]
    return Call(lambda: collectives.scatter_sum_along(x, axis, 0), values.cast(piece))


def _all_to_all(values: Values) -> Call:
    return _exchange(values, [[1] * values.axis.size] * values.axis.size)


def _all_to_all_uneven(values: Values) -> Call:
    # Some get nothing and some a double share.
    indices = range(values.axis.size)
    return _exchange(values, [[(i + 2 * j) % 3 for j in indices] for i in indices])


def _exchange(values: Values, shares: list[list[int]]) -> Call:
    """An exchange where rank i sends ``shares[i][j]`` times the rows of a piece to rank j."""
    axis, me = values.axis, values.axis.rank
    splits = [[share * values.rows for share in row] for row in shares]
    mine, sizes = splits[me], [row[me] for row in splits]
    x = values.brought(me, sum(mine))
    pieces = [values.brought(i, sum(row)).split(row)[me] for i, row in enumerate(splits)]
    return Call(lambda: collectives.exchange_rows(x, sizes, mine, axis), torch.cat(pieces))


def _ring_shift(values: Values) -> Call:
    axis, x = values.axis, values.brought(values.axis.rank)
    before = values.brought((axis.rank - 1) % axis.size)
    return Call(lambda: collectives.start_shift(x, axis)(), before)


def _broadcast(values: Values) -> Call:
    axis, source = values.axis, values.axis.size - 1
    mine = values.brought(axis.rank)

    def run() -> Tensor:
        x = mine.clone()
        dist.broadcast(x, src=axis.ranks[source], group=axis.group)
        return x

    return Call(run, values.brought(source))


def barrier(axis: Axis, store: Store, key: str) -> Call:
    """A barrier; the result is how many ranks had come to it when it let this one go.

    Args:
        axis: the ranks.
        store: where they count.
        key: of the counter, of this group's own.
    """

    def run() -> Tensor:
        if axis.rank == 0:
            time.sleep(_LATE)
        store.add(key, 1)
        dist.barrier(group=axis.group)
        return torch.tensor([store.add(key, 0)])

    return Call(run, torch.tensor([axis.size]), lambda: dist.barrier(group=axis.group))


PROBES: dict[str, Callable[[Values], Call]] = {
    "all_reduce": _all_reduce,
    "all_reduce_max": _all_reduce_max,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "all_to_all_uneven": _all_to_all_uneven,
    "ring_shift": _ring_shift,
    "broadcast": _broadcast,
}
"""Every collective with a tensor; ``barrier`` has none."""


def difference(found: Tensor, expected: Tensor) -> str:
    """How two tensors differ, in words; empty where they do not."""
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return (
            f"found {found.dtype} of shape {tuple(found.shape)},"
            f" must be {expected.dtype} of shape {tuple(expected.shape)}"
        )
    wrong = (found != expected).nonzero()
    if not len(wrong):
        return ""
    at = int(wrong[0])
    return (
        f"{len(wrong)} of {len(found)} values differ, the first at {at}:"
        f" found {found[at].item()}, must be {expected[at].item()}"
    )
