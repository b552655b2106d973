"""Layers of the MSA representation (supplement, algorithms 7, 8, 10 and 19).

Legend: any leading dims, S sequences, N residues, C channels, H heads.
"""

import torch
from torch import Tensor, nn

from fivefold.fold.model.primitives import Attention, Bias, LayerNorm, Linear, in_chunks
from fivefold.fold.ops.outer_product import outer_product


class MSARowAttentionWithPairBias(nn.Module):
    """Residues of a sequence attend to each other, biased by the pair representation.

    Args:
        c_m: channels of the MSA representation.
        c_z: of the pair representation.
        num_heads: of attention.
        head_width: of one head.
    """

    def __init__(self, c_m: int, c_z: int, num_heads: int, head_width: int):
        super().__init__()
        self.layer_norm_m = LayerNorm(c_m)
        self.layer_norm_z = LayerNorm(c_z)
        self.linear_z = Linear(c_z, num_heads, bias=False)
        self.attention = Attention(c_m, num_heads, head_width)

    def forward(
        self, m: Tensor, z: Tensor, key_mask: Tensor | None, chunk_size: int | None = None
    ) -> Tensor:
        """The update of m (..., S, N, C) by z (..., N, N, C); key_mask (..., S, N) bool."""
        return self.attend(m, self.bias(z), key_mask, chunk_size)

    def bias(self, z: Tensor) -> Tensor:
        """What z (..., N, N, C) adds to the scores, (..., 1, H, N, N)."""
        return self.linear_z(self.layer_norm_z(z)).movedim(-1, -3).unsqueeze(-4)

    def attend(
        self, m: Tensor, bias: Bias, key_mask: Tensor | None, chunk_size: int | None = None
    ) -> Tensor:
        """The update of rows of m, with the bias of all pairs."""

        def some_rows(m: Tensor, key_mask: Tensor | None) -> Tensor:
            mask = None if key_mask is None else key_mask.squeeze(-1)
            return self.attention(self.layer_norm_m(m), bias, mask)

        return in_chunks(some_rows, (m, _with_channel(key_mask)), chunk_size)


class MSAColumnAttention(nn.Module):
    """Sequences attend to each other at each residue.

    Args:
        c_m: channels of the MSA representation.
        num_heads: of attention.
        head_width: of one head.
    """

    def __init__(self, c_m: int, num_heads: int, head_width: int):
        super().__init__()
        self.layer_norm_m = LayerNorm(c_m)
        self.attention = Attention(c_m, num_heads, head_width)

    def forward(self, m: Tensor, key_mask: Tensor | None, chunk_size: int | None = None) -> Tensor:
        """The update of m (..., S, N, C); key_mask (..., S, N) bool."""
        m = m.transpose(-2, -3)
        mask = None if key_mask is None else _with_channel(key_mask.mT)
        return in_chunks(self._columns, (m, mask), chunk_size).transpose(-2, -3)

    def _columns(self, m: Tensor, key_mask: Tensor | None) -> Tensor:
        mask = None if key_mask is None else key_mask.squeeze(-1)
        return self.attention(self.layer_norm_m(m), None, mask)


class MSAColumnGlobalAttention(nn.Module):
    """At each residue one query, the mean of all sequences, attends to them.

    Args:
        c_m: channels of the MSA representation.
        num_heads: of attention, which share keys and values.
        head_width: of one head.
    """

    def __init__(self, c_m: int, num_heads: int, head_width: int):
        super().__init__()
        self.layer_norm_m = LayerNorm(c_m)
        self.attention = GlobalAttention(c_m, num_heads, head_width)

    def forward(self, m: Tensor, mask: Tensor, chunk_size: int | None = None) -> Tensor:
        """The update of m (..., S, N, C); mask (..., S, N)."""
        inputs = (m.transpose(-2, -3), mask.mT.unsqueeze(-1))
        return in_chunks(self._columns, inputs, chunk_size).transpose(-2, -3)

    def _columns(self, m: Tensor, mask: Tensor) -> Tensor:
        return self.attention(self.layer_norm_m(m), mask)


class GlobalAttention(nn.Module):
    """Attention of one query to everything (supplement, algorithm 19, lines 2 to 7).

    Args:
        channels: of input and output.
        num_heads: H.
        head_width: D.
    """

    def __init__(self, channels: int, num_heads: int, head_width: int):
        super().__init__()
        self.num_heads, self.head_width = num_heads, head_width
        inner = num_heads * head_width
        self.linear_q = Linear(channels, inner, bias=False, init="glorot")
        self.linear_k = Linear(channels, head_width, bias=False, init="glorot")
        self.linear_v = Linear(channels, head_width, bias=False, init="glorot")
        self.linear_g = Linear(channels, inner, init="gate")
        self.linear_o = Linear(inner, channels, init="zero")

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """The update of x (..., T, C) from those whose mask (..., T, 1) is 1."""
        mean = (x * mask).sum(-2) / (mask.sum(-2) + 1e-10)
        query_hd = self.linear_q(mean).unflatten(-1, (self.num_heads, -1)) * self.head_width**-0.5
        scores_ht = query_hd @ self.linear_k(x).mT + 1e9 * (mask.mT - 1)
        out_hd = torch.softmax(scores_ht, -1) @ self.linear_v(x)
        gate = torch.sigmoid(self.linear_g(x))
        return self.linear_o(gate * out_hd.flatten(-2).unsqueeze(-2))


class OuterProductMean(nn.Module):
    """What the MSA says about pairs (supplement, algorithm 10).

    Args:
        c_m: channels of the MSA representation.
        c_z: of the pair representation.
        c_outer: of each side of the product.
    """

    def __init__(self, c_m: int, c_z: int, c_outer: int):
        super().__init__()
        self.layer_norm = LayerNorm(c_m)
        self.linear_ab = Linear(c_m, 2 * c_outer)
        self.linear_out = Linear(c_outer * c_outer, c_z, init="zero")

    def forward(self, m: Tensor, mask: Tensor, chunk_size: int | None = None) -> Tensor:
        """The update (..., N, N, C) of the pairs from m (..., S, N, C) and mask (..., S, N)."""
        a_snc, b_snd = self.sides(m, mask)
        return self.combine(a_snc, b_snd, mask.mT @ mask, chunk_size)

    def sides(self, m: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides of the product (..., S, N, C)."""
        ab = self.linear_ab(self.layer_norm(m)) * mask.unsqueeze(-1)
        a, b = ab.chunk(2, -1)
        return a, b

    def combine(
        self, a_snc: Tensor, b_snd: Tensor, counts: Tensor, chunk_size: int | None = None
    ) -> Tensor:
        """The update of the pairs, of which counts (..., I, J) says how many sequences see both."""
        layer = self.linear_out
        outer = outer_product(a_snc, b_snd, layer.weight, layer.bias, num_rows=chunk_size)
        return outer / (counts.unsqueeze(-1) + 1e-3)


def _with_channel(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.unsqueeze(-1)
