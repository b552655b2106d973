"""Layers of the pair representation (supplement, algorithms 11 to 15).

Legend: any leading dims, N residues, C channels, H heads.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fivefold import kernels
from fivefold.fold.model.primitives import Attention, Bias, LayerNorm, Linear, fill, in_chunks


class TriangleMultiplication(nn.Module):
    """An edge is updated by the two other edges of all triangles.

    Outgoing, ``x_ij = sum_k a_ik b_jk``, is over the edges that leave i and j; incoming,
    ``x_ij = sum_k a_ki b_kj``, over those that arrive there. Projections and their gates are one
    product, made channel by channel, as the triangles need it.

    Args:
        c_z: channels of the pair representation.
        c_hidden: of the products.
        outgoing: which of the two.
    """

    def __init__(self, c_z: int, c_hidden: int, *, outgoing: bool):
        super().__init__()
        self.outgoing = outgoing
        self.layer_norm_in = LayerNorm(c_z)
        self.linear_abg = GatedPair(c_z, c_hidden)
        self.layer_norm_out = LayerNorm(c_hidden)
        self.linear_z = Linear(c_hidden, c_z, init="zero")
        self.linear_g = Linear(c_z, c_z, init="gate")

    def forward(self, z: Tensor, mask: Tensor, chunk_size: int | None = None) -> Tensor:
        """The update of z (..., N, N, C) where mask (..., N, N) is 1."""
        z, a_cik, b_cjk = self.edges(z, mask)
        return self.combine(z, a_cik, lambda: b_cjk, chunk_size)

    def edges(self, z: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The normalised z and both sides of the product, (..., C, I, K) and (..., C, J, K)."""
        z = self.layer_norm_in(z)
        a, b = self.linear_abg(z, mask)
        return (z, a, b) if self.outgoing else (z, a.mT, b.mT)

    def combine(
        self, z: Tensor, a_cik: Tensor, b_cjk: Callable[[], Tensor], chunk_size: int | None = None
    ) -> Tensor:
        """The update of the normalised z (..., I, J, C); the second side is asked for late."""

        def some_rows(z: Tensor, a_ikc: Tensor) -> Tensor:
            gate = torch.sigmoid(self.linear_g(z))
            product_ijc = (a_ikc.movedim(-1, -3) @ b_cjk().mT).movedim(-3, -1)
            return self.linear_z(self.layer_norm_out(product_ijc)) * gate

        return in_chunks(some_rows, (z, a_cik.movedim(-3, -1)), chunk_size)


class GatedPair(kernels.Linear):
    """Two gated projections: a, b, gate of a and gate of b, in this order along the output.

    Args:
        c_z: channels of the input.
        c_hidden: of each of the four.
    """

    def __init__(self, c_z: int, c_hidden: int):
        self.c_hidden = c_hidden
        super().__init__(c_z, 4 * c_hidden)

    def reset_parameters(self) -> None:
        """Projections keep the variance; gates begin open."""
        with torch.no_grad():
            fill(self.weight[: 2 * self.c_hidden], "linear")
            self.weight[2 * self.c_hidden :].zero_()
            self.bias[: 2 * self.c_hidden].zero_()
            self.bias[2 * self.c_hidden :].fill_(1.0)

    def forward(self, z: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Of z (..., I, J, c_z) both projections (..., c_hidden, I, J), 0 where mask is."""
        # Weights times positions: that way round channels come first.
        both = kernels.linear(self.weight, z.flatten(0, -2)) + self.bias.unsqueeze(-1)
        value, gate = both.chunk(2)
        gated = value * torch.sigmoid(gate) * mask.flatten()
        a, b = gated.unflatten(-1, z.shape[:-1]).chunk(2)
        return a.movedim(0, -3), b.movedim(0, -3)


class TriangleAttentionStartingNode(nn.Module):
    """Edges that leave the same residue attend to each other, biased by the third edge.

    Args:
        c_z: channels of the pair representation.
        num_heads: of attention.
        head_width: of one head.
    """

    def __init__(self, c_z: int, num_heads: int, head_width: int):
        super().__init__()
        self.layer_norm = LayerNorm(c_z)
        self.linear_bias = Linear(c_z, num_heads, bias=False)
        self.attention = Attention(c_z, num_heads, head_width)

    def forward(self, z: Tensor, key_mask: Tensor | None, chunk_size: int | None = None) -> Tensor:
        """The update of z (..., N, N, C); key_mask (..., N, N) bool."""
        z = self.layer_norm(z)
        return self.attend(z, self.bias(z), key_mask, chunk_size)

    def bias(self, z: Tensor) -> Tensor:
        """What the normalised z adds to the scores, (..., 1, H, N, N)."""
        return self.linear_bias(z).movedim(-1, -3).unsqueeze(-4)

    def attend(
        self, z: Tensor, bias: Bias, key_mask: Tensor | None, chunk_size: int | None = None
    ) -> Tensor:
        """The update of rows of the normalised z, with the bias of all."""

        def some_rows(z: Tensor, key_mask: Tensor | None) -> Tensor:
            mask = None if key_mask is None else key_mask.squeeze(-1)
            return self.attention(z, bias, mask)

        mask = None if key_mask is None else key_mask.unsqueeze(-1)
        return in_chunks(some_rows, (z, mask), chunk_size)


class TriangleAttentionEndingNode(TriangleAttentionStartingNode):
    """Edges that arrive at the same residue attend to each other: the same, transposed."""

    def forward(self, z: Tensor, key_mask: Tensor | None, chunk_size: int | None = None) -> Tensor:
        """The update of z (..., N, N, C); key_mask (..., N, N) bool."""
        mask = None if key_mask is None else key_mask.mT
        return super().forward(z.transpose(-2, -3), mask, chunk_size).transpose(-2, -3)
