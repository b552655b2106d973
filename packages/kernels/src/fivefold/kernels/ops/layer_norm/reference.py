"""The specification of ``layer_norm`` in plain PyTorch, and its gradient written out.

Legend: O outer, I inner, N values in a row; rows are (O, I).
"""

import torch
from torch import Tensor

from fivefold.kernels.operands import widened


def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The result (O, I, N), mean and 1/std (O, I)."""
    x_oin = widened(x)
    mean_oi1 = x_oin.mean(-1, keepdim=True)
    centred_oin = x_oin - mean_oi1
    rstd_oi1 = torch.rsqrt(centred_oin.square().mean(-1, keepdim=True) + eps)
    y_oin = centred_oin * rstd_oi1
    if weight is not None:
        y_oin = y_oin * widened(weight)
    if bias is not None:
        y_oin = y_oin + widened(bias)
    return y_oin.to(x.dtype).contiguous(), mean_oi1.squeeze(-1), rstd_oi1.squeeze(-1)


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``weight`` and ``bias``; empty (0,) where absent."""
    dy_oin, rstd_oi1 = widened(dy), rstd.unsqueeze(-1)
    normed_oin = (widened(x) - mean.unsqueeze(-1)) * rstd_oi1
    dnormed_oin = dy_oin if weight is None else dy_oin * widened(weight)
    shift_oi1 = dnormed_oin.mean(-1, keepdim=True)
    projection_oi1 = (dnormed_oin * normed_oin).mean(-1, keepdim=True)
    dx_oin = (dnormed_oin - shift_oi1 - normed_oin * projection_oi1) * rstd_oi1

    dweight, dbias = x.new_empty(0), x.new_empty(0)
    if weight is not None:
        dweight = (dy_oin * normed_oin).sum((0, 1)).to(weight.dtype)
    if bias is not None:
        dbias = dy_oin.sum((0, 1)).to(bias.dtype)
    return dx_oin.to(x.dtype).contiguous(), dweight, dbias
