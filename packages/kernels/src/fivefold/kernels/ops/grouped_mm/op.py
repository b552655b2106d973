"""``grouped_mm`` as registered ops: shapes for tracing, gradients.

Legend: T the ragged dim, E groups, K and M and N the others.
"""

from typing import Any

import torch
from torch import Tensor

from fivefold.kernels.autocast import as_autocast
from fivefold.kernels.op import define
from fivefold.kernels.ops.grouped_mm.check import check

BACKENDS = ("aten", "triton", "reference")


@define("fivefold_kernels", backends=BACKENDS)
def grouped_mm(
    mat_a: Tensor, mat_b: Tensor, offs: Tensor, out_dtype: torch.dtype, backend: str | None
) -> Tensor:
    """``(T, K)``, ``(E, K, N)`` to ``(T, N)``, zero after the last group."""
    return mat_a.new_empty(mat_a.shape[0], mat_b.shape[2], dtype=out_dtype)


@define("fivefold_kernels", backends=BACKENDS)
def grouped_outer(
    mat_a: Tensor, mat_b: Tensor, offs: Tensor, out_dtype: torch.dtype, backend: str | None
) -> Tensor:
    """``(M, T)``, ``(T, N)`` to ``(E, M, N)``, zero for empty groups."""
    return mat_a.new_empty(offs.shape[0], mat_a.shape[0], mat_b.shape[1], dtype=out_dtype)


@define("fivefold_kernels", backends=("triton", "reference"))
def grouped_mm_scaled(
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    out_dtype: torch.dtype,
    backend: str | None,
) -> Tensor:
    """``grouped_mm`` of operands to divide by scales, (T,) or (1,) and (E,) or (1,).

    It has no gradient.
    """
    return mat_a.new_empty(mat_a.shape[0], mat_b.shape[2], dtype=out_dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    mat_a, mat_b, offs, _, ctx.backend = inputs
    ctx.dtype = mat_a.dtype
    # What only the gradient of a frozen operand would need is not kept.
    wants_a, wants_b = ctx.needs_input_grad[:2]
    ctx.transposed = mat_b.stride(-2) < mat_b.stride(-1)
    ctx.save_for_backward(mat_a if wants_b else None, mat_b if wants_a else None, offs)


def _mm_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    mat_a, mat_b, offs = ctx.saved_tensors
    dy, dtype = dy.to(ctx.dtype), ctx.dtype
    da = db = None
    if ctx.needs_input_grad[0]:
        da = grouped_mm(dy, mat_b.mT, offs, dtype, ctx.backend)
    if ctx.needs_input_grad[1] and ctx.transposed:
        # Laid out as the matrices are, or autograd would copy all of it to lay it out so.
        db = grouped_outer(dy.mT, mat_a, offs, dtype, ctx.backend).mT
    elif ctx.needs_input_grad[1]:
        db = grouped_outer(mat_a.mT, dy, offs, dtype, ctx.backend)
    return da, db, None, None, None


def _outer_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    mat_a, mat_b, offs = ctx.saved_tensors
    dy, dtype = dy.to(ctx.dtype), ctx.dtype
    da = db = None
    if ctx.needs_input_grad[0]:
        da = grouped_mm(mat_b, dy.mT, offs, dtype, ctx.backend).mT
    if ctx.needs_input_grad[1]:
        db = grouped_mm(mat_a.mT, dy, offs, dtype, ctx.backend)
    return da, db, None, None, None


grouped_mm.differentiate(_save, _mm_backward, repeatedly=True)
grouped_outer.differentiate(_save, _outer_backward, repeatedly=True)


def apply(
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor,
    out_dtype: torch.dtype | None,
    scale_a: Tensor | None,
    scale_b: Tensor | None,
    backend: str | None,
) -> Tensor:
    """See ``grouped_mm``: follow autocast, check, choose the form, run."""
    mat_a, mat_b = as_autocast(mat_a, mat_b)
    check(mat_a, mat_b, offs, out_dtype, scale_a, scale_b)
    offs = offs.contiguous()
    if out_dtype is None:
        out_dtype = torch.bfloat16 if mat_a.dtype.itemsize == 1 else mat_a.dtype
    if scale_a is not None and scale_b is not None:
        scales = [scale.detach().reshape(-1).contiguous() for scale in (scale_a, scale_b)]
        operands = mat_a.detach(), mat_b.detach()
        return grouped_mm_scaled(*operands, offs, *scales, out_dtype, backend)
    if mat_a.dim() == 3:
        return grouped_mm(mat_b.mT, mat_a.mT, offs, out_dtype, backend).mT
    if mat_b.dim() == 2:
        return grouped_outer(mat_a, mat_b, offs, out_dtype, backend)
    return grouped_mm(mat_a, mat_b, offs, out_dtype, backend)
