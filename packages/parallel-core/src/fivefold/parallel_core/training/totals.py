"""Sums of named tensors over all ranks, in one message."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from fivefold.parallel_core.errors import ParallelError
from fivefold.parallel_core.ledger import labelled
from fivefold.parallel_core.topology import Axis


class Totals:
    """Sums dictionaries of tensors over the world; ranks may hold different names.

    Which names and shapes there are is asked once and must stay the same from call to call.

    Args:
        world: all ranks.
    """

    def __init__(self, world: Axis):
        self.world = world
        self._shapes: dict[str, tuple[int, ...]] = {}

    def sum(self, mine: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The float64 sums over the ranks; a name that a rank lacks counts as zero there.

        Raises:
            ParallelError: a name that was not there in the first call.
        """
        if not self._shapes:
            self._shapes = self._agree(mine)
        unknown = sorted(mine.keys() - self._shapes.keys())
        if unknown:
            raise ParallelError(
                f"totals {', '.join(unknown)} are new; the first step had {', '.join(self._shapes)}"
            )
        device = next(iter(mine.values())).device if mine else torch.device("cpu")
        parts = [
            mine[name].double().reshape(-1)
            if name in mine
            else torch.zeros(torch.Size(shape).numel(), dtype=torch.float64, device=device)
            for name, shape in self._shapes.items()
        ]
        flat = torch.cat(parts)
        if self.world.group is not None:
            with labelled(self.world.name):
                dist.all_reduce(flat, group=self.world.group)
        pieces = flat.split([part.numel() for part in parts])
        return {
            name: piece.view(shape)
            for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True)
        }

    def _agree(self, mine: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        shapes = {name: tuple(value.shape) for name, value in mine.items()}
        everyone: list[dict[str, tuple[int, ...]] | None] = [shapes]
        if self.world.group is not None:
            everyone = [None] * self.world.size
            dist.all_gather_object(everyone, shapes, group=self.world.group)
        union = {name: shape for of_rank in everyone for name, shape in (of_rank or {}).items()}
        return dict(sorted(union.items()))
