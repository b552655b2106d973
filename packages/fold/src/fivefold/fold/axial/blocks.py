"""Blocks whose rank holds rows or columns, and which exchange them while they compute.

Of the MSA representation a rank holds sequences where residues attend to each other, and residues
where sequences do and in the transition and the outer product mean. Of the pair representation it
holds rows but in the attention of the ending node and the transition after it. Two exchanges have a
branch of the block to themselves: the pairs change back to rows while the MSA is worked on, and
the MSA changes back to sequences while the pairs are.

Dropout needs no care: all of its masks are shared along the dim that is shared, so every rank draws
what one process would.

Legend: any leading dims, S sequences, N residues, C channels; in brackets what a rank holds.
"""

from functools import cache

from torch import Tensor

from fivefold.fold.axial.layers import (
    COLUMNS,
    ROWS,
    attend,
    multiply,
    pair_up,
    share,
    to_columns,
    to_rows,
)
from fivefold.fold.model.blocks import (
    EvoformerBlock,
    EvoformerPairBlock,
    Masks,
    PairBlock,
    TemplatePairBlock,
)
from fivefold.parallel_core.shares import start_gather
from fivefold.parallel_core.topology import Axis


class _AxialPairs(PairBlock):
    """The steps that both kinds of blocks take.

    Attributes:
        axis: the ranks that share a sample.
    """

    axis: Axis

    def multiply(self, z: Tensor, masks: Masks, chunk_size: int | None) -> Tensor:
        """The z (..., [N], N, C) after both triangle multiplications."""
        for layer in (self.triangle_multiplication_outgoing, self.triangle_multiplication_incoming):
            z = z + self.row_dropout(multiply(layer, z, masks.pair, self.axis, chunk_size))
        return z

    def attend(self, z: Tensor, masks: Masks, chunk_size: int | None) -> Tensor:
        """The z (..., [N], N, C) as z (..., N, [N], C) after both triangle attentions."""
        axis, keys = self.axis, masks.pair_keys
        start, end = self.triangle_attention_starting, self.triangle_attention_ending
        z = z + self.row_dropout(attend(start, z, share(keys, axis, ROWS), axis, chunk_size))
        z = to_columns(z, axis, z.shape[COLUMNS])()
        mask = share(keys, axis, COLUMNS)
        mask = None if mask is None else mask.mT
        update = attend(end, z.transpose(-2, -3), mask, axis, chunk_size).transpose(-2, -3)
        return z + self.column_dropout(update)


class AxialEvoformerPairBlock(_AxialPairs, EvoformerPairBlock):
    """From rows to columns; otherwise as it is."""


class AxialTemplatePairBlock(_AxialPairs, TemplatePairBlock):
    """From rows to rows."""

    def attend(self, z: Tensor, masks: Masks, chunk_size: int | None) -> Tensor:
        """The z (..., [N], N, C) after both triangle attentions."""
        z = super().attend(z, masks, chunk_size)
        return to_rows(z, self.axis, z.shape[ROWS])()


class AxialEvoformerBlock(EvoformerBlock):
    """A block of the main or the extra MSA stack.

    Attributes:
        axis: the ranks that share a sample.
    """

    axis: Axis

    def forward(
        self, m: Tensor, z: Tensor, masks: Masks, chunk_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The m (..., [S], N, C) and z (..., N, [N], C) after the block; masks are whole."""
        axis, (num_sequences, num_residues) = self.axis, masks.msa.shape[-2:]
        row = self.msa_row_attention
        bias = cache(start_gather(row.bias(z), axis, -1, num_residues))
        z_rows = to_rows(z, axis, num_residues)
        row_mask = share(masks.msa_keys, axis, ROWS)
        m = m + self.msa_dropout(row.attend(m, bias, row_mask, chunk_size))
        m = to_columns(m, axis, num_sequences)()
        column_mask = share(masks.msa if self.is_extra else masks.msa_keys, axis, COLUMNS)
        m = m + self.msa_column_attention(m, column_mask, chunk_size)
        m = m + self.msa_transition(m, chunk_size)
        outer = pair_up(self.outer_product_mean, m, masks.msa, axis)
        m_rows = to_rows(m, axis, num_residues)
        z = self.pair(z_rows() + outer(chunk_size), masks, chunk_size)
        return m_rows(), z
