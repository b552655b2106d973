"""The process groups of a layout at run time, passed around and never global."""

import re
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from fivefold.parallel_core._compat import new_group
from fivefold.parallel_core.errors import LayoutError
from fivefold.parallel_core.layout import Layout

# Groups are made when the topology is, in this order on every rank: a group made later, on
# demand, would deadlock as soon as two ranks asked for two groups in different orders.
AXES = ("tp", "cp", "dp", "pp", "ep", "etp", "edp", "tp-cp", "dp-cp", "etp-ep", "tp-dp-cp")

PP_ENDS = "pp-ends"
"""The first and the last rank of a pipeline; an axis of one rank on those between them."""

_FACTOR = re.compile(r"([a-z-]+)(//|%)([1-9][0-9]*)")


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis (or join of axes) of the layout as this rank sees it.

    Attributes:
        name: "tp", "dp-cp", ...
        size: number of ranks along it.
        rank: this rank's index along it.
        ranks: the global ranks along it, in order.
        group: the process group, or None where ``size`` is 1: nothing is ever sent on it.
    """

    name: str
    size: int
    rank: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None = None


class Topology:
    """A ``Layout`` with its process groups, seen from one rank.

    Groups are cached by the tuple of their ranks: axes with equal members (EP and TP×DP, say)
    share one group, and the pipeline groups of both views are the same objects.

    Args:
        layout: the layout; its world size must be the job's.
        device: where this rank's tensors live; the default is the CPU.

    Raises:
        LayoutError: the job has another number of ranks than the layout.
    """

    def __init__(self, layout: Layout, *, device: torch.device | str = "cpu"):
        if dist.is_initialized():
            self.world_rank, found = dist.get_rank(), dist.get_world_size()
        else:
            self.world_rank, found = 0, 1
        if layout.world_size != found:
            raise LayoutError(
                f"the layout is for {layout.world_size} ranks, but the job has {found}; start the "
                f"job with {layout.world_size} ranks or change the layout"
            )
        self.layout = layout
        self.device = torch.device(device)
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self._meshes: dict[tuple[int, ...], DeviceMesh] = {}
        self._apart: dict[str, Axis] = {}
        self._axes = {name: self._make_axis(name) for name in AXES}
        if found > 1:
            self._group((self.world_rank,))  # `mesh` may want it later, and then it is too late

    @classmethod
    def local(cls, device: torch.device | str = "cpu") -> "Topology":
        """The topology of one process by itself; needs no ``torch.distributed``."""
        topology = cls.__new__(cls)
        topology.layout, topology.device, topology.world_rank = Layout(1), torch.device(device), 0
        topology._groups, topology._meshes = {}, {}
        topology._axes = {name: Axis(name, 1, 0, (0,)) for name in AXES}
        return topology

    def _make_axis(self, name: str) -> Axis:
        return self._axis_over(name, tuple(self.layout.group_of(name, self.world_rank)))

    def _axis_over(self, name: str, ranks: tuple[int, ...]) -> Axis:
        group = self._group(ranks) if len(ranks) > 1 else None
        return Axis(name, len(ranks), ranks.index(self.world_rank), ranks, group)

    def _group(self, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        world = dist.group.WORLD
        if world is None:
            raise LayoutError(
                "this process is in no process group, which FSDP needs even for one rank (also to "
                "compute in another dtype than it stores); start it with launch() or torchrun"
            )
        if len(ranks) == self.layout.world_size:
            return world
        if ranks not in self._groups:
            # Only members take part, so the cost on a rank is its own few groups, not the world's.
            self._groups[ranks] = new_group(ranks)
        return self._groups[ranks]

    def axis(self, name: str) -> Axis:
        """The axis called ``name``: tp cp dp pp ep etp edp, or a join listed in ``AXES``.

        Two factors of an axis can be asked for: ``"tp%2"`` are pairs of neighbours along "tp", and
        ``"tp//2"`` the ranks that stand at one place of their pairs. ``"pp-ends"`` are the first
        and the last pipeline rank. All ranks of an axis must ask for its factors first in the same
        order, as they do where they apply one plan: the groups are made then.

        Raises:
            LayoutError: no such axis, or a factor that does not divide it.
        """
        if name not in self._axes:
            self._axes[name] = self._axis_over(name, self._ranks_of_part(name))
        return self._axes[name]

    def _ranks_of_part(self, name: str) -> tuple[int, ...]:
        """The ranks of an axis that is a part of another."""
        if name == PP_ENDS:
            ends = (self.axis("pp").ranks[0], self.axis("pp").ranks[-1])
            inside = self.world_rank not in ends or ends[0] == ends[1]
            return (self.world_rank,) if inside else ends
        found = _FACTOR.fullmatch(name)
        if found is None or found[1] not in self._axes:
            legal = ", ".join(self._axes)
            raise LayoutError(f"no axis {name!r} in this topology; there are {legal}")
        whole, inner = self._axes[found[1]], int(found[3])
        if whole.size % inner:
            raise LayoutError(
                f"axis {name!r}: {whole.name} has {whole.size} ranks; ask for a divisor of it"
            )
        outer_index, inner_index = divmod(whole.rank, inner)
        if found[2] == "%":
            return whole.ranks[outer_index * inner : (outer_index + 1) * inner]
        return whole.ranks[inner_index::inner]

    def group(self, name: str) -> dist.ProcessGroup | None:
        """The process group of an axis; None where the axis has one rank."""
        return self.axis(name).group

    def rank(self, name: str) -> int:
        """This rank's index along an axis."""
        return self.axis(name).rank

    def size(self, name: str) -> int:
        """Number of ranks along an axis."""
        return self.axis(name).size

    def apart(self, name: str) -> Axis:
        """An axis with a group of its own, whose messages keep no order with those of others.

        All ranks must ask for them first in the same order, as for factors in ``axis``.
        """
        axis = self.axis(name)
        if axis.group is None:
            return axis
        if name not in self._apart:
            group = new_group(axis.ranks)
            self._apart[name] = replace(axis, group=group)
        return self._apart[name]

    def mesh(self, name: str) -> DeviceMesh:
        """A one-dimensional device mesh over an axis, on the same group; what FSDP2 asks for.

        Raises:
            LayoutError: no such axis, or this process is in no process group.
        """
        ranks = self.axis(name).ranks
        if ranks not in self._meshes:
            self._meshes[ranks] = DeviceMesh.from_group(
                self._group(ranks), self.device.type, mesh_dim_names=(name,)
            )
        return self._meshes[ranks]

    @property
    def world(self) -> Axis:
        """All ranks as one axis."""
        size = self.layout.world_size
        group = dist.group.WORLD if size > 1 else None
        return Axis("world", size, self.world_rank, tuple(range(size)), group)
