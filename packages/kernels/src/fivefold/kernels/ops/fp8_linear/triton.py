"""``fp8_linear`` in Triton: float8 products of rows by rows, scaled before the result is rounded.

Operands are what ``fp8_quantize`` leaves, the transposed copies too: tensor cores take float8 with
the summed dim innermost. Sums of gradients leave the tensor cores often, as in torchao's recipe.

Legend: M rows of the input, K its width, N width of the result.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fivefold.kernels.backends import interpreting
from fivefold.kernels.launch import launch, tensor_cores
from fivefold.kernels.ops.fp8_quantize import triton as quantize
from fivefold.kernels.ops.grouped_mm.triton import place, tile_of
from fivefold.kernels.triton_parts import dot

_E4M3 = torch.float8_e4m3fn

# The interpreter makes a number of NaN when it casts from float8.
_INTERPRETED, _NAN = tl.constexpr(interpreting()), tl.constexpr(0x7F)


def refuses(name: str, *inputs: Any) -> str | None:
    """GPUs without float8, and float64."""
    x = inputs[0]
    if x.dtype == torch.float64:
        return "its kernel sums in float32, which is too coarse for torch.float64"
    return quantize.refuses(name, x)


def fp8_linear_forward(
    x: Tensor,
    weight: Tensor,
    grad_dtype: torch.dtype,
    power_of_2: bool,
    keep_x: bool,
    keep_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The result (M, N), bytes of ``x`` (K, M) and scale, bytes of ``weight`` (K, N) and scale."""
    x_fp8, x_t, x_scale = quantize.fp8_quantize(x, _E4M3, power_of_2, keep_x)
    weight_fp8, weight_t, weight_scale = quantize.fp8_quantize(
        weight, _E4M3, power_of_2, keep_weight
    )
    y = _mm(x_fp8, weight_fp8, x_scale, weight_scale, x.dtype, fast=True)
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
    dy_fp8, dy_t, dy_scale = quantize.fp8_quantize(dy, grad_dtype, power_of_2, x_t.dim() == 2)
    dx, dweight = dy.new_empty(0), dy.new_empty(0)
    if weight_t.dim() == 2:
        dx = _mm(dy_fp8, weight_t.view(_E4M3), dy_scale, weight_scale, dy.dtype, fast=False)
    if x_t.dim() == 2:
        dweight = _mm(dy_t, x_t.view(_E4M3), dy_scale, x_scale, dy.dtype, fast=False)
    return dx, dweight


def _mm(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, *, fast: bool
) -> Tensor:
    """``a @ b.T`` of float8 values, divided by both scales; fast sums are a little coarser."""
    (height, inner), width = a.shape, b.shape[0]
    out = torch.empty((height, width), dtype=dtype, device=a.device)
    tile = tile_of(height, width, a.dtype, tensor_cores(a), num_sums=1 if fast else 2)
    launch(
        _mm_kernel,
        (triton.cdiv(height, tile["ROWS"]) * triton.cdiv(width, tile["COLS"]),),
        a,
        b,
        out,
        scale_a,
        scale_b,
        height,
        width,
        inner,
        PROMOTE=not fast,
        **tile,
    )
    return out


@triton.jit
def _mm_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    scale_a_ptr,
    scale_b_ptr,
    height,
    width,
    inner,
    PROMOTE: tl.constexpr,
    BAND: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
):
    tiles_down, tiles_across = tl.cdiv(height, ROWS), tl.cdiv(width, COLS)
    down, across = place(tl.program_id(0), tiles_down, tiles_across, BAND)
    rows = down * ROWS + tl.arange(0, ROWS).to(tl.int64)
    cols = across * COLS + tl.arange(0, COLS).to(tl.int64)
    row_in, col_in = rows < height, cols < width
    along = tl.arange(0, INNER)
    a_at = a_ptr + rows[:, None] * inner + along[None, :]
    b_at = b_ptr + along[:, None] + cols[None, :] * inner
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, inner, INNER):
        inner_in = along + start < inner
        a = tl.load(a_at, mask=row_in[:, None] & inner_in[None, :], other=0.0)
        b = tl.load(b_at, mask=inner_in[:, None] & col_in[None, :], other=0.0)
        if PROMOTE:
            # Tensor cores keep but 14 bits or so of a sum of float8.
            acc += dot(_operand(a), _operand(b), tl.zeros_like(acc))
        else:
            acc = dot(_operand(a), _operand(b), acc)
        a_at += INNER
        b_at += INNER
    # One after the other: their product may be out of range.
    acc = acc / tl.load(scale_a_ptr) / tl.load(scale_b_ptr)
    out_at = out_ptr + rows[:, None] * width + cols[None, :]
    inside = row_in[:, None] & col_in[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _operand(x):
    """Float8 values as ``dot`` takes them."""
    if _INTERPRETED:
        number = ((x.to(tl.uint8, bitcast=True) & _NAN) != _NAN).to(tl.float32)
        return x.to(tl.float32) * number / number
    else:
        return x
