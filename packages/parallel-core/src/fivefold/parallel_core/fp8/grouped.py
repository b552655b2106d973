"""Products of experts in FP8: one scale for the rows and one for the matrices of all experts.

Legend: E experts here, T rows (token copies), K and N features of input and result.
"""

from typing import Any

import torch
from torch import Tensor

from fivefold.parallel_core.fp8.products import Products
from fivefold.parallel_core.fp8.scaling import E4M3, Format, largest, rounded, scale_of
from fivefold.parallel_core.topology import Axis


def grouped_linear(
    x_tk: Tensor,
    weight_enk: Tensor,
    ends_e: Tensor,
    ranks: Axis | None,
    form: Format,
    products: Products,
) -> Tensor:
    """Rows of each expert times its matrix (T, N), in FP8 forward and backward.

    One byte is kept for each value of rows and matrices.

    Args:
        x_tk: rows sorted by expert.
        weight_enk: matrices, in any floating-point dtype; their gradient comes in it.
        ends_e: where each expert's rows end, int32.
        ranks: that hold other experts, or parts of them, whose values count for the scales; None
            where this one holds all.
        form: how tensors are rounded.
        products: what computes.
    """
    weight_enk = weight_enk.to(x_tk.dtype)
    out: Tensor = _GroupedLinear.apply(x_tk, weight_enk, ends_e, ranks, form, products)
    return out


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_tk: Tensor,
        weight_enk: Tensor,
        ends_e: Tensor,
        axis: Axis | None,
        form: Format,
        products: Products,
    ) -> Tensor:
        amaxes = largest([x_tk, weight_enk], axis)
        scale_x, scale_w = (scale_of(each, E4M3, form.power_of_2) for each in amaxes)
        x_fp8, w_fp8 = rounded(x_tk, scale_x, E4M3), rounded(weight_enk, scale_w, E4M3)
        ctx.save_for_backward(x_fp8, scale_x, w_fp8, scale_w, ends_e)
        ctx.axis, ctx.form, ctx.products, ctx.dtype = axis, form, products, x_tk.dtype
        return products.rows(x_fp8, scale_x, w_fp8.mT, scale_w, ends_e, x_tk.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_fp8, scale_x, w_fp8, scale_w, ends_e = ctx.saved_tensors
        form, products = ctx.form, ctx.products
        (amax,) = largest(grads, ctx.axis)
        scale = scale_of(amax, form.grad_dtype, form.power_of_2)
        dy_fp8 = rounded(grads[0], scale, form.grad_dtype)
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = products.rows(dy_fp8, scale, w_fp8, scale_w, ends_e, ctx.dtype)
        if ctx.needs_input_grad[1]:
            dweight = products.outer(dy_fp8, scale, x_fp8, scale_x, ends_e, ctx.dtype)
        return dx, dweight, None, None, None, None
