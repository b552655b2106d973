"""One rank's topology without a process behind it, for all that sends nothing."""

import torch

from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.topology import AXES, Axis, Topology


class Imagined(Topology):
    """``Topology`` of ``rank`` in ``layout``; its axes have no groups."""

    def __init__(self, layout: Layout, rank: int):
        self.layout, self.world_rank, self.device = layout, rank, torch.device("cpu")
        self._axes = {name: self._make_axis(name) for name in AXES}

    def _axis_over(self, name: str, ranks: tuple[int, ...]) -> Axis:
        return Axis(name, len(ranks), ranks.index(self.world_rank), ranks)


def imagined(world_size: int, **degrees: int) -> list[Imagined]:
    """The topologies of all ranks of a layout."""
    layout = Layout(world_size, **degrees)
    return [Imagined(layout, rank) for rank in range(world_size)]
