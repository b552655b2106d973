"""Blocks and stacks of the MSA and the pair representation (supplement, algorithms 6, 16, 18).

Legend: any leading dims, S sequences, N residues, T templates, C channels.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from fivefold.fold.config import StackConfig
from fivefold.fold.model.msa import (
    MSAColumnAttention,
    MSAColumnGlobalAttention,
    MSARowAttentionWithPairBias,
    OuterProductMean,
)
from fivefold.fold.model.pair import (
    TriangleAttentionEndingNode,
    TriangleAttentionStartingNode,
    TriangleMultiplication,
)
from fivefold.fold.model.primitives import SharedDropout, Transition


@dataclass(frozen=True, slots=True)
class Masks:
    """Which sequences and residues there are.

    Attributes:
        msa: (..., S, N) 1 for what is there.
        pair: (..., N, N)
        msa_keys: the first as bool; None where everything is there.
        pair_keys: the second as bool; None where everything is there.
    """

    msa: Tensor
    pair: Tensor
    msa_keys: Tensor | None
    pair_keys: Tensor | None

    @classmethod
    def of(cls, msa: Tensor, pair: Tensor) -> "Masks":
        """Masks of floats; see ``keys``."""
        return cls(msa, pair, keys(msa), keys(pair))


def keys(mask: Tensor) -> Tensor | None:
    """A mask as attention takes it: bool, or None where nothing is masked.

    Looking is free on a CPU and saves the mask of every attention; on other devices it would wait
    for everything before it, so there a mask always stays.
    """
    if mask.device.type == "cpu" and bool((mask > 0).all()):
        return None
    return mask > 0


class PairBlock(nn.Module):
    """What the main and the extra MSA stack do to pairs, after the outer product mean."""

    def __init__(self, config: StackConfig, c_z: int):
        super().__init__()
        heads = (config.num_pair_heads, config.pair_head_width)
        c_hidden = config.c_triangle
        self.triangle_multiplication_outgoing = TriangleMultiplication(c_z, c_hidden, outgoing=True)
        self.triangle_multiplication_incoming = TriangleMultiplication(
            c_z, c_hidden, outgoing=False
        )
        self.triangle_attention_starting = TriangleAttentionStartingNode(c_z, *heads)
        self.triangle_attention_ending = TriangleAttentionEndingNode(c_z, *heads)
        self.pair_transition = Transition(c_z, config.transition_factor)
        self.row_dropout = SharedDropout(config.pair_dropout, -3)
        self.column_dropout = SharedDropout(config.pair_dropout, -2)

    def multiply(self, z: Tensor, masks: Masks, chunk_size: int | None) -> Tensor:
        """The z (..., N, N, C) after both triangle multiplications."""
        for layer in (self.triangle_multiplication_outgoing, self.triangle_multiplication_incoming):
            z = z + self.row_dropout(layer(z, masks.pair, chunk_size))
        return z

    def attend(self, z: Tensor, masks: Masks, chunk_size: int | None) -> Tensor:
        """The z (..., N, N, C) after both triangle attentions."""
        start, end = self.triangle_attention_starting, self.triangle_attention_ending
        z = z + self.row_dropout(start(z, masks.pair_keys, chunk_size))
        return z + self.column_dropout(end(z, masks.pair_keys, chunk_size))


class EvoformerPairBlock(PairBlock):
    """Multiplications first, then attention."""

    def forward(self, z: Tensor, masks: Masks, chunk_size: int | None = None) -> Tensor:
        """The z (..., N, N, C) after the block."""
        z = self.attend(self.multiply(z, masks, chunk_size), masks, chunk_size)
        return z + self.pair_transition(z, chunk_size)


class TemplatePairBlock(PairBlock):
    """Attention first, then multiplications."""

    def forward(self, z: Tensor, masks: Masks, chunk_size: int | None = None) -> Tensor:
        """The z (..., N, N, C) after the block."""
        z = self.multiply(self.attend(z, masks, chunk_size), masks, chunk_size)
        return z + self.pair_transition(z, chunk_size)


class EvoformerBlock(nn.Module):
    """One block of the main stack (algorithm 6, lines 2 to 10).

    Args:
        config: of the stack.
        c_m: channels of the MSA representation.
        c_z: of the pair representation.
        is_extra: whether columns attend globally, as in the extra MSA stack.
    """

    def __init__(self, config: StackConfig, c_m: int, c_z: int, *, is_extra: bool):
        super().__init__()
        heads = (config.num_msa_heads, config.msa_head_width)
        self.is_extra = is_extra
        self.msa_row_attention = MSARowAttentionWithPairBias(c_m, c_z, *heads)
        column = MSAColumnGlobalAttention if is_extra else MSAColumnAttention
        self.msa_column_attention = column(c_m, *heads)
        self.msa_transition = Transition(c_m, config.transition_factor)
        self.outer_product_mean = OuterProductMean(c_m, c_z, config.c_outer)
        self.pair = EvoformerPairBlock(config, c_z)
        self.msa_dropout = SharedDropout(config.msa_dropout, -3)

    def forward(
        self, m: Tensor, z: Tensor, masks: Masks, chunk_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The m (..., S, N, C) and z (..., N, N, C) after the block."""
        row = self.msa_row_attention(m, z, masks.msa_keys, chunk_size)
        m = m + self.msa_dropout(row)
        column_mask = masks.msa if self.is_extra else masks.msa_keys
        m = m + self.msa_column_attention(m, column_mask, chunk_size)
        m = m + self.msa_transition(m, chunk_size)
        z = z + self.outer_product_mean(m, masks.msa, chunk_size)
        return m, self.pair(z, masks, chunk_size)


class Whole(nn.Module):
    """Where a stack begins and ends: the seam at which its input is scattered and gathered."""

    def forward(self, m: Tensor, z: Tensor, masks: Masks) -> tuple[Tensor, Tensor, Masks]:
        """Everything as it came."""
        return m, z, masks


class EvoformerStack(nn.Module):
    """Blocks one after another, over the clustered or over the extra MSA.

    Args:
        config: of the stack.
        c_m: channels of its MSA representation.
        c_z: of the pair representation.
        is_extra: whether this is the extra MSA stack.
    """

    def __init__(self, config: StackConfig, c_m: int, c_z: int, *, is_extra: bool = False):
        super().__init__()
        self.enter = Whole()
        self.blocks = nn.ModuleDict(
            {
                str(number): EvoformerBlock(config, c_m, c_z, is_extra=is_extra)
                for number in range(config.num_blocks)
            }
        )
        self.leave = Whole()

    def forward(
        self, m: Tensor, z: Tensor, masks: Masks, chunk_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The m (..., S, N, C) and z (..., N, N, C) after all blocks."""
        m, z, masks = self.enter(m, z, masks)
        for block in self.blocks.values():
            m, z = block(m, z, masks, chunk_size)
        m, z, _ = self.leave(m, z, masks)
        return m, z


class TemplatePairStack(nn.Module):
    """Blocks over the pair representation of templates (algorithm 16), which share the weights.

    Args:
        config: of the stack.
        c_t: channels of a template's pair representation.
    """

    def __init__(self, config: StackConfig, c_t: int):
        super().__init__()
        self.enter = Whole()
        self.blocks = nn.ModuleDict(
            {str(number): TemplatePairBlock(config, c_t) for number in range(config.num_blocks)}
        )
        self.leave = Whole()

    def forward(self, t: Tensor, pair_mask: Tensor, chunk_size: int | None = None) -> Tensor:
        """The t (..., N, N, C) after all blocks; pair_mask (..., N, N)."""
        nothing = t.new_empty(0)
        masks = Masks(nothing, pair_mask, None, keys(pair_mask))
        _, t, masks = self.enter(nothing, t, masks)
        for block in self.blocks.values():
            t = block(t, masks, chunk_size)
        return self.leave(nothing, t, masks)[1]
