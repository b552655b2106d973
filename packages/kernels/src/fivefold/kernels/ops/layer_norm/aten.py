"""``layer_norm`` by torch's own fused kernels, which the CPU falls back on without a compiler.

Legend: O outer, I inner, N values in a row; rows are (O, I).
"""

import torch
from torch import Tensor

from fivefold.kernels.operands import sum_dtype


def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The result (O, I, N), mean and 1/std (O, I)."""
    wide = sum_dtype(x.dtype)
    y, mean, rstd = torch.native_layer_norm(
        x.to(wide), x.shape[2:], _to(weight, wide), _to(bias, wide), eps
    )
    return y.to(x.dtype), mean.squeeze(-1), rstd.squeeze(-1)


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``weight`` and ``bias``; empty (0,) where absent."""
    wide = rstd.dtype
    found = torch.ops.aten.native_layer_norm_backward(
        dy.to(wide),
        x.to(wide),
        x.shape[2:],
        mean.unsqueeze(-1),
        rstd.unsqueeze(-1),
        _to(weight, wide),
        _to(bias, wide),
        [True, weight is not None, bias is not None],
    )
    dx, dweight, dbias = (
        x.new_empty(0) if like is None else each.to(like.dtype)
        for each, like in zip(found, (x, weight, bias), strict=True)
    )
    return dx, dweight, dbias


def _to(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    # torch keeps the statistics in the dtype of the rows: float32 at least.
    return None if parameter is None else parameter.to(dtype)
