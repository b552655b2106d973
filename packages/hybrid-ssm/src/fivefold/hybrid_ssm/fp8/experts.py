"""Routed experts in FP8: one scale for the rows and one for the matrices of all experts.

Legend: E experts here, T rows (token copies), K and N features of input and result, F expert width,
I width of the experts' input.
"""

from typing import Any

import torch
from torch import Tensor

from fivefold.hybrid_ssm.blocks.experts import Relu2Experts
from fivefold.hybrid_ssm.fp8.scaling import E4M3, Format, largest, rounded, scale_of
from fivefold.kernels import grouped_mm, relu2
from fivefold.kernels.operands import sum_dtype
from fivefold.parallel_core.topology import Axis


class _GroupedLinear(torch.autograd.Function):
    """Rows (T, K) of each expert times its matrix (N, K)."""

    @staticmethod
    def forward(
        ctx: Any, x_tk: Tensor, weight_enk: Tensor, ends_e: Tensor, axis: Axis | None, how: Format
    ) -> Tensor:
        amaxes = largest([x_tk, weight_enk], axis)
        scale_x, scale_w = (scale_of(each, E4M3, how.power_of_2) for each in amaxes)
        x_fp8, w_fp8 = rounded(x_tk, scale_x, E4M3), rounded(weight_enk, scale_w, E4M3)
        ctx.save_for_backward(x_fp8, scale_x, w_fp8, scale_w, ends_e)
        ctx.axis, ctx.how, ctx.dtype = axis, how, x_tk.dtype
        return _rows(x_fp8, scale_x, w_fp8.mT, scale_w, ends_e, x_tk.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_fp8, scale_x, w_fp8, scale_w, ends_e = ctx.saved_tensors
        (amax,) = largest(grads, ctx.axis)
        scale = scale_of(amax, ctx.how.grad_dtype, ctx.how.power_of_2)
        dy_fp8 = rounded(grads[0], scale, ctx.how.grad_dtype)
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = _rows(dy_fp8, scale, w_fp8, scale_w, ends_e, ctx.dtype)
        if ctx.needs_input_grad[1]:
            dweight = _outer(dy_fp8, scale, x_fp8, scale_x, ends_e, ctx.dtype)
        return dx, dweight, None, None, None


def _rows(
    a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, ends_e: Tensor, dtype: torch.dtype
) -> Tensor:
    return grouped_mm(a, b, offs=ends_e, out_dtype=dtype, scale_a=scale_a, scale_b=scale_b)


def _outer(
    dy: Tensor, scale_dy: Tensor, x: Tensor, scale_x: Tensor, ends_e: Tensor, dtype: torch.dtype
) -> Tensor:
    """``dy.T @ x`` of each expert's rows (E, N, K): float8 values are exact in bfloat16."""
    wide = sum_dtype(dtype)
    exact = torch.bfloat16 if x.is_cuda else wide
    out = grouped_mm(dy.to(exact).mT, x.to(exact), offs=ends_e, out_dtype=wide)
    return (out / (scale_dy.to(wide) * scale_x.to(wide))).to(dtype)


class FP8Experts(Relu2Experts):
    """``Relu2Experts`` in FP8, with scales of the experts and rows of all ranks.

    Attributes:
        ranks: that hold other experts or parts of their width; None where this one holds all.
        format: how tensors are rounded.
    """

    ranks: Axis | None
    format: Format

    def forward(self, x_ti: Tensor, counts_e: Tensor) -> Tensor:
        """As in the base: rows sorted by expert (T, I) and their counts (E,) to (T, I)."""
        ends_e = counts_e.cumsum(0).to(torch.int32)
        how = (ends_e, self.ranks, self.format)
        hidden = relu2(_GroupedLinear.apply(x_ti, self.up.to(x_ti.dtype), *how))
        return _GroupedLinear.apply(hidden, self.down.to(x_ti.dtype), *how)
