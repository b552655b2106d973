"""The specification of ``fp8_linear``: products of rounded operands, emulated in float32.

Float8 values are divided by their scales before a product, so that its every bit is torchao's.

Legend: M rows of the input, K its width, N width of the result.
"""

from typing import Any

import torch
from torch import Tensor

from fivefold.kernels.operands import sum_dtype
from fivefold.kernels.ops.fp8_quantize.reference import fp8_quantize

_E4M3 = torch.float8_e4m3fn


def fp8_linear_forward(
    x: Tensor,
    weight: Tensor,
    grad_dtype: torch.dtype,
    power_of_2: bool,
    keep_x: bool,
    keep_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The result (M, N), bytes of ``x`` (K, M) and scale, bytes of ``weight`` (K, N) and scale."""
    wide = sum_dtype(x.dtype)
    x_mk, x_t, x_scale = fp8_quantize(x.detach(), _E4M3, power_of_2, keep_x)
    weight_nk, weight_t, weight_scale = fp8_quantize(
        weight.detach(), _E4M3, power_of_2, keep_weight
    )
    rounded = _Rounded.apply(x, x_mk.to(wide) / x_scale)
    rounded_weight = _Rounded.apply(weight, weight_nk.to(wide) / weight_scale)
    y = torch.mm(rounded, rounded_weight.t())
    y = _RoundedGradient.apply(y, x.dtype, grad_dtype, power_of_2)
    return y, x_t.view(torch.uint8), x_scale, weight_t.view(torch.uint8), weight_scale


def fp8_linear_backward(
    dy: Tensor,
    x_t: Tensor,
    x_scale: Tensor,
    weight_t: Tensor,
    weight_scale: Tensor,
    grad_dtype: torch.dtype,
    power_of_2: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` (M, K) and ``weight`` (N, K); (0,) where the other was not kept."""
    wide = sum_dtype(dy.dtype)
    dy_fp8, _, dy_scale = fp8_quantize(dy, grad_dtype, power_of_2, False)
    dy_mn = dy_fp8.to(wide) / dy_scale
    dx, dweight = dy.new_empty(0), dy.new_empty(0)
    if weight_t.dim() == 2:
        # In the order of memory that the forward product has: sums of another have other bits.
        weight_nk = weight_t.view(_E4M3).t().contiguous().to(wide) / weight_scale
        dx = torch.mm(dy_mn, weight_nk).to(dy.dtype)
    if x_t.dim() == 2:
        x_mk = x_t.view(_E4M3).t().contiguous().to(wide) / x_scale
        dweight = torch.mm(dy_mn.t(), x_mk).to(dy.dtype)
    return dx, dweight


class _Rounded(torch.autograd.Function):
    """The rounded values of a tensor, whose gradient passes as if they were its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


class _RoundedGradient(torch.autograd.Function):
    """A result in its own dtype, whose gradient is rounded to float8."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, dtype: torch.dtype, grad_dtype: torch.dtype, power_of_2: bool
    ) -> Tensor:
        ctx.wide, ctx.grad_dtype, ctx.power_of_2 = y.dtype, grad_dtype, power_of_2
        return y.to(dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        dy_fp8, _, scale = fp8_quantize(dy, ctx.grad_dtype, ctx.power_of_2, False)
        return dy_fp8.to(ctx.wide) / scale, None, None, None
