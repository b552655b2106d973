"""The specification of ``outer_product`` in plain PyTorch, all at once.

Legend: B batch, S sequences, I and J residues, C and D channels, Z channels of the result.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fivefold.kernels.operands import widened


def outer_product_forward(
    a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None, num_rows: int | None
) -> Tensor:
    """``a`` (B, S, I, C), ``b`` (B, S, J, D), ``weight`` (Z, C * D) to the result (B, I, J, Z)."""
    outer_bijx = _outer(a, b)
    wide = (widened(weight), None if bias is None else widened(bias))
    return F.linear(outer_bijx, *wide).to(a.dtype)


def outer_product_backward(
    dout: Tensor, a: Tensor, b: Tensor, weight: Tensor, num_rows: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``a``, ``b`` and ``weight``."""
    dout_bijz = widened(dout)
    dweight = torch.einsum("bijz,bijx->zx", dout_bijz, _outer(a, b))
    douter_bijcd = (dout_bijz @ widened(weight)).unflatten(-1, (a.shape[-1], b.shape[-1]))
    da = torch.einsum("bijcd,bsjd->bsic", douter_bijcd, widened(b))
    db = torch.einsum("bijcd,bsic->bsjd", douter_bijcd, widened(a))
    return da.to(a.dtype), db.to(b.dtype), dweight.to(weight.dtype)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("bsic,bsjd->bijcd", widened(a), widened(b)).flatten(-2)
