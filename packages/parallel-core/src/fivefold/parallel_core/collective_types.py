"""What each collective takes, gives and costs: one table, which its tests and the doctor read.

How a tensor lies along an axis is said in four words, after the types of the SPMD literature:

- ``replicate``: every rank holds the same values, and each rank's gradient is a part of the sum;
- ``invariant``: every rank holds the same values, and every rank holds the same whole gradient;
- ``shard``: every rank holds its own piece;
- ``partial``: the value is the sum of what the ranks hold.

The gradient of a ``replicate`` tensor is ``partial`` and the other way round; ``shard`` and
``invariant`` are their own.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Declared:
    """What a collective takes, gives and costs.

    Costs are formulas of the bytes one rank sends, t ranks and n bytes of the whole tensor. Where
    ranks hold unequal numbers of rows, own and others are the bytes of this rank's rows and of the
    other ranks', sent and received those that go to and come from other ranks.

    Attributes:
        source: how the input lies along the axis.
        result: how the output lies along the axis.
        forward: cost of the forward pass.
        backward: cost of the backward pass.
    """

    source: str
    result: str
    forward: str
    backward: str


_RING, _TWICE = "(t-1)/t*n", "2*(t-1)/t*n"
_TO_ALL, _FROM_ALL = "(t-1)*own", "others"

DECLARED: dict[str, Declared] = {
    "copy": Declared("invariant", "replicate", "0", _TWICE),
    "all_reduce": Declared("partial", "invariant", _TWICE, "0"),
    "all_gather": Declared("shard", "replicate", _RING, _RING),
    "reduce_scatter": Declared("partial", "shard", _RING, _RING),
    "gather": Declared("shard", "invariant", _RING, "0"),
    "split": Declared("invariant", "shard", "0", _RING),
    "all_to_all": Declared("shard", "shard", "sent", "received"),
    "all_gather_v": Declared("shard", "replicate", _TO_ALL, _FROM_ALL),
    "reduce_scatter_v": Declared("partial", "shard", _FROM_ALL, _TO_ALL),
}
