"""How the network lies over ranks: whole on each of them, samples on some, rows on the others.

The ranks of the axis "tp" share a sample (dynamic axial parallelism). They have all parameters;
those of the stacks see a part of the rows each, so that their gradients are partial over the axis,
and those of everything else see all and have whole gradients.
"""

from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn

from fivefold.fold.axial.blocks import (
    AxialEvoformerBlock,
    AxialEvoformerPairBlock,
    AxialTemplatePairBlock,
)
from fivefold.fold.axial.layers import COLUMNS, ROWS
from fivefold.fold.config import AlphaFoldConfig
from fivefold.fold.model.blocks import EvoformerBlock, Masks, TemplatePairBlock, Whole
from fivefold.parallel_core.parameters import ParameterTable
from fivefold.parallel_core.shares import gather_shares, split_shares
from fivefold.parallel_core.styles import Plan, Replicate, Style
from fivefold.parallel_core.topology import Axis

AXIS = "tp"
"""The axis of the layout whose ranks share a sample."""

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class AxialBlock(Style):
    """A block of a stack, on the rows that a rank holds."""

    def apply(self, module: nn.Module, name: str, table: ParameterTable) -> nn.Module:
        """Exchange the ways of the block; its parameters stay whole."""
        block = self._expect(module, name, EvoformerBlock, TemplatePairBlock)
        axis = table.topology.axis(AXIS)
        Replicate(axis=AXIS).apply(block, name, table)
        if axis.size == 1:
            return block
        if isinstance(block, TemplatePairBlock):
            return _in_the_way_of(AxialTemplatePairBlock, block, axis)
        pair = block.get_submodule("pair")
        block.pair = _in_the_way_of(AxialEvoformerPairBlock, pair, axis)
        return _in_the_way_of(AxialEvoformerBlock, block, axis)


def _in_the_way_of(kind: type[M], module: nn.Module, axis: Axis) -> M:
    """The same module, parameters and all, with the forward of another class."""
    found = kind.__new__(kind)
    found.__dict__ = {**module.__dict__, "axis": axis}
    return found


@dataclass(frozen=True)
class ScatterStack(Style):
    """Where a stack begins: ranks go on with their parts.

    Attributes:
        pair_dim: of the pair representation that is shared; None where it is already.
    """

    pair_dim: int | None

    def apply(self, module: nn.Module, name: str, table: ParameterTable) -> nn.Module:
        """Swap the seam."""
        seam, axis = self._expect(module, name, Whole), table.topology.axis(AXIS)
        return seam if axis.size == 1 else _Scatter(axis, self.pair_dim)


@dataclass(frozen=True)
class GatherStack(Style):
    """Where a stack ends: ranks go on with the whole.

    Attributes:
        pair_dim: of the pair representation that is shared; None where the parts are wanted, and
            of the MSA nothing.
    """

    pair_dim: int | None

    def apply(self, module: nn.Module, name: str, table: ParameterTable) -> nn.Module:
        """Swap the seam."""
        seam, axis = self._expect(module, name, Whole), table.topology.axis(AXIS)
        return _Collect(axis, self.pair_dim) if axis.size > 1 and self.pair_dim else seam


class _Scatter(nn.Module):
    def __init__(self, axis: Axis, pair_dim: int | None):
        super().__init__()
        self.axis, self.pair_dim = axis, pair_dim

    def forward(self, m: Tensor, z: Tensor, masks: Masks) -> tuple[Tensor, Tensor, Masks]:
        if self.pair_dim is not None:
            z = split_shares(z, self.axis, self.pair_dim)
        # A stack of templates has no sequences.
        m = split_shares(m, self.axis, ROWS) if m.numel() else m
        return m, z, masks


class _Collect(nn.Module):
    def __init__(self, axis: Axis, pair_dim: int):
        super().__init__()
        self.axis, self.pair_dim = axis, pair_dim

    def forward(self, m: Tensor, z: Tensor, masks: Masks) -> tuple[Tensor, Tensor, Masks]:
        z = gather_shares(z, self.axis, self.pair_dim, masks.pair.shape[-1])
        if masks.msa.numel():
            m = gather_shares(m, self.axis, ROWS, masks.msa.shape[-2])
        return m, z, masks


def plan(config: AlphaFoldConfig) -> Plan:
    """The plan of a network; it names only what the network has.

    The extra MSA is not needed after its stack, and the pairs go on to the main stack as they lie.
    """
    whole = ("input_embedder", "recycling_embedder", "extra_msa_embedder", "linear_single")
    lines: dict[str, Style] = {
        name: Replicate(sequence=False) for name in (*whole, "structure_module", "heads")
    }
    if config.template is not None:
        lines["template_embedder"] = Replicate(sequence=False)
        lines |= _stack("template_pair_stack", ROWS, ROWS)
    lines |= _stack("extra_msa_stack", COLUMNS, None)
    return lines | _stack("evoformer", None, COLUMNS)


def _stack(name: str, enter: int | None, leave: int | None) -> dict[str, Style]:
    return {
        f"{name}.enter": ScatterStack(enter),
        f"{name}.blocks.*": AxialBlock(),
        f"{name}.leave": GatherStack(leave),
    }
