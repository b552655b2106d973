"""Context parallelism: attention over sequences that are split over ranks."""

from typing import Any

import torch
from torch import Tensor, nn

from fivefold.parallel_core.collectives import all_gather
from fivefold.parallel_core.topology import Axis


class GatheredContext(nn.Module):
    """An attention core whose queries are this rank's part of the sequence.

    Keys and values of all ranks are gathered (and their gradients reduce-scattered); every rank
    attends from its own queries. Pieces are contiguous: of a sequence of S tokens rank r holds the
    positions from r·S/cp to (r+1)·S/cp - 1.

    Args:
        core: called as ``core(q, k, v, query_start=...)``.
        axis: the ranks that split the sequence.
    """

    def __init__(self, core: nn.Module, axis: Axis):
        super().__init__()
        self.core, self.axis = core, axis

    def forward(self, q: Tensor, k: Tensor, v: Tensor, query_start: int | None = None) -> Tensor:
        """(B, S/cp, heads, D) queries, keys and values to (B, S/cp, heads, D)."""
        if query_start is not None:
            raise ValueError(
                "a key-value cache was passed to attention under context parallelism "
                f"(cp={self.axis.size}); generate with cp=1"
            )
        start = self.axis.rank * q.shape[1]
        k, v = all_gather(torch.cat((k, v), dim=-1), self.axis, dim=1).chunk(2, dim=-1)
        # The core masks what lies after a query, which is every key of the ranks behind; these
        # need not even be read.
        stop = start + q.shape[1]
        out: Tensor = self.core(q, k[:, :stop], v[:, :stop], query_start=start)
        return out


class OffsetPositions(nn.Module):
    """Positions of this rank's contiguous part of the sequence."""

    def __init__(self, positions: nn.Module, axis: Axis):
        super().__init__()
        self.positions, self.axis = positions, axis

    def forward(self, length: int, *args: Any, **kwargs: Any) -> Tensor:
        """The positions of ``length`` tokens, from this rank's first one on."""
        out: Tensor = self.positions(length, *args, **kwargs) + self.axis.rank * length
        return out
