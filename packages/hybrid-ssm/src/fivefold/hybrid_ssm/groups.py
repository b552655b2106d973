"""Mamba-2 layers over tensor ranks: heads, and the groups that they share.

A rank has whole heads. Where there are at least as many groups as ranks it has their groups whole
too; where there are fewer, neighbouring ranks hold copies of one group's B and C, each with a part
of the gradient, and the norm's mean over the group's channels is taken over them together.

Legend: K channels of this rank, all of one group.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fivefold.hybrid_ssm.blocks.heads import Heads
from fivefold.hybrid_ssm.norm import GatedNorm
from fivefold.parallel_core.collectives import all_reduce, copy
from fivefold.parallel_core.parameters import ParameterTable, Placement
from fivefold.parallel_core.styles import Style, head_copies, rows_with_copies, shard_parameter
from fivefold.parallel_core.topology import Axis

_OF_GROUPS = ("conv_b.", "conv_c.")


class SharedGroupNorm(GatedNorm):
    """``GatedNorm`` of channels whose one group lies over several ranks.

    Args:
        norm: whose weight is already this rank's.
        axis: the ranks of the group.
    """

    def __init__(self, norm: GatedNorm, axis: Axis):
        nn.Module.__init__(self)
        self.weight, self.eps, self.axis = norm.weight, norm.eps, axis
        self.group_size = norm.group_size

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        """Both (..., K) to the same shape."""
        wide = torch.promote_types(y.dtype, torch.float32)
        gated = y.to(wide) * F.silu(gate.to(wide))
        squares = gated.square().sum(dim=-1, keepdim=True)
        # Every rank's outputs depend on the sum, so their gradients with respect to it are summed.
        total = copy(all_reduce(squares, self.axis), self.axis)
        normed = gated * torch.rsqrt(total / self.group_size + self.eps)
        return (normed * self.weight.to(wide)).to(y.dtype)


@dataclass(frozen=True)
class HeadsParallel(Style):
    """The parameters of heads and groups, and the norm's, split along their first dim.

    Attributes:
        num_groups: of the whole layer.
        axis: the ranks.
    """

    num_groups: int
    axis: str = "tp"

    def apply(self, module: nn.Module, name: str, table: ParameterTable) -> nn.Module:
        """Cut every parameter below the module."""
        self._expect(module, name, Heads, GatedNorm)
        axis = table.topology.axis(self.axis)
        copies = head_copies(self.num_groups, axis, name)
        for key, parameter in list(module.named_parameters()):
            sharded, partial = rows_with_copies(axis, copies if key.startswith(_OF_GROUPS) else 1)
            path, _, last = key.rpartition(".")
            prefix = f"{name}.{path}" if path else name
            placement = Placement(shape=tuple(parameter.shape), sharded=sharded, partial=partial)
            shard_parameter(module.get_submodule(path), prefix, last, table, placement)
        if isinstance(module, GatedNorm) and copies > 1:
            ranks = self.axis if copies == axis.size else f"{self.axis}%{copies}"
            return SharedGroupNorm(module, table.topology.axis(ranks))
        return module
