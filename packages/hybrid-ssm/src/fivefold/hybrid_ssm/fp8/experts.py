"""Routed experts in FP8.

Legend: E experts here, T rows (token copies), I width of the experts' input.
"""

import torch
from torch import Tensor

from fivefold.hybrid_ssm.blocks.experts import Relu2Experts
from fivefold.kernels import relu2
from fivefold.parallel_core.fp8.grouped import grouped_linear
from fivefold.parallel_core.fp8.products import Products
from fivefold.parallel_core.fp8.scaling import Format
from fivefold.parallel_core.topology import Axis


class FP8Experts(Relu2Experts):
    """``Relu2Experts`` in FP8, with scales of the experts and rows of all ranks.

    Attributes:
        ranks: that hold other experts or parts of their width; None where this one holds all.
        format: how tensors are rounded.
        products: what computes.
    """

    ranks: Axis | None
    format: Format
    products: Products

    def forward(self, x_ti: Tensor, counts_e: Tensor) -> Tensor:
        """As in the base: rows sorted by expert (T, I) and their counts (E,) to (T, I)."""
        ends_e = counts_e.cumsum(0).to(torch.int32)
        how = (ends_e, self.ranks, self.format, self.products)
        hidden = relu2(grouped_linear(x_ti, self.up, *how))
        return grouped_linear(hidden, self.down, *how)
