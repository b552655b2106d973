"""``layer_norm`` in Triton: tiles of some whole rows, loaded once, from wherever they lie.

The backward pass walks many rows in each program, so that the gradients of weight and bias are
summed in registers and leave one partial row a program.

Legend: O outer, I inner, N values in a row; rows are (O, I).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fivefold.kernels.launch import launch, num_sms
from fivefold.kernels.operands import sum_dtype
from fivefold.kernels.ops.layer_norm.rows import side_by_side
from fivefold.kernels.sizes import next_power_of_2
from fivefold.kernels.triton_parts import accumulator

# A program holds a tile in registers: more values than this would spill.
_LARGEST_ROW = 16384


def refuses(name: str, *inputs: Any) -> str | None:
    """Rows that do not fit the registers of one program."""
    x = inputs[0]
    if x.shape[2] > _LARGEST_ROW:
        return f"its kernel takes rows of up to {_LARGEST_ROW} values, these have {x.shape[2]}"
    return None


def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The result (O, I, N), mean and 1/std (O, I)."""
    x = side_by_side(x)
    outer, inner, width = x.shape
    y = torch.empty((outer, inner, width), dtype=x.dtype, device=x.device)
    wide = sum_dtype(x.dtype)
    mean = torch.empty((outer, inner), dtype=wide, device=x.device)
    rstd = torch.empty((outer, inner), dtype=wide, device=x.device)
    tile = _tile(width, values=4096)
    launch(
        _forward_kernel,
        (triton.cdiv(outer * inner, tile["ROWS"]),),
        x,
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        y,
        mean,
        rstd,
        outer * inner,
        inner,
        width,
        x.stride(0),
        x.stride(1),
        eps,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        COMPUTE=accumulator(x.dtype),
        num_warps=_num_warps(tile, values=1024),
        **tile,
    )
    return y, mean, rstd


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``weight`` and ``bias``; empty (0,) where absent."""
    dy, x, mean, rstd = side_by_side(dy), side_by_side(x), mean.contiguous(), rstd.contiguous()
    outer, inner, width = x.shape
    tile = _tile(width, values=4096)
    programs = min(triton.cdiv(outer * inner, tile["ROWS"]), 4 * num_sms(x))
    dx = torch.empty((outer, inner, width), dtype=x.dtype, device=x.device)
    sums = [
        None
        if parameter is None
        else torch.empty((programs, width), dtype=rstd.dtype, device=x.device)
        for parameter in (weight, bias)
    ]
    launch(
        _backward_kernel,
        (programs,),
        dy,
        x,
        None if weight is None else weight.contiguous(),
        mean,
        rstd,
        dx,
        *sums,
        outer * inner,
        inner,
        width,
        dy.stride(0),
        dy.stride(1),
        x.stride(0),
        x.stride(1),
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        COMPUTE=accumulator(x.dtype),
        num_warps=_num_warps(tile, values=512),
        **tile,
    )
    dweight, dbias = (
        x.new_empty(0) if partial is None or parameter is None else _sum(partial, parameter)
        for partial, parameter in zip(sums, (weight, bias), strict=True)
    )
    return dx, dweight, dbias


@triton.jit
def _forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    num_rows,
    inner,
    width,
    x_outer_stride,
    x_inner_stride,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    cols = tl.arange(0, COLS)
    row_in, col_in = rows < num_rows, cols < width
    inside = row_in[:, None] & col_in[None, :]

    x_rows = rows // inner * x_outer_stride + rows % inner * x_inner_stride
    x = tl.load(x_ptr + x_rows[:, None] + cols[None, :], mask=inside, other=0).to(COMPUTE)
    mean = tl.sum(x, axis=1) / width
    centred = tl.where(col_in[None, :], x - mean[:, None], 0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + eps)
    tl.store(mean_ptr + rows, mean, mask=row_in)
    tl.store(rstd_ptr + rows, rstd, mask=row_in)
    y = centred * rstd[:, None]
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + cols, mask=col_in, other=0).to(COMPUTE)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=col_in, other=0).to(COMPUTE)[None, :]
    out = y_ptr + rows[:, None] * width + cols[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    num_rows,
    inner,
    width,
    dy_outer_stride,
    dy_inner_stride,
    x_outer_stride,
    x_inner_stride,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    program = tl.program_id(0)
    cols = tl.arange(0, COLS)
    col_in = cols < width
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + cols, mask=col_in, other=0).to(COMPUTE)
    dweight = tl.zeros((ROWS, COLS), COMPUTE)
    dbias = tl.zeros((ROWS, COLS), COMPUTE)

    for block in range(program, tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows = block * ROWS + tl.arange(0, ROWS).to(tl.int64)
        row_in = rows < num_rows
        inside = row_in[:, None] & col_in[None, :]
        dy_rows = rows // inner * dy_outer_stride + rows % inner * dy_inner_stride
        x_rows = rows // inner * x_outer_stride + rows % inner * x_inner_stride
        dy = tl.load(dy_ptr + dy_rows[:, None] + cols[None, :], mask=inside, other=0)
        x = tl.load(x_ptr + x_rows[:, None] + cols[None, :], mask=inside, other=0)
        mean = tl.load(mean_ptr + rows, mask=row_in, other=0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=row_in, other=0)[:, None]
        dy = dy.to(COMPUTE)
        normed = (x.to(COMPUTE) - mean) * rstd
        dweight += dy * normed
        dbias += dy
        dnormed = dy
        if HAS_WEIGHT:
            dnormed = dy * weight[None, :]
        shift = tl.sum(dnormed, axis=1) / width
        # dnormed is 0 beyond the row, so what normed is there does not count.
        projection = tl.sum(dnormed * normed, axis=1) / width
        dx = (dnormed - shift[:, None] - normed * projection[:, None]) * rstd
        out = dx_ptr + rows[:, None] * width + cols[None, :]
        tl.store(out, dx.to(dx_ptr.dtype.element_ty), mask=inside)

    at = program.to(tl.int64) * width + cols
    if HAS_WEIGHT:
        tl.store(dweight_ptr + at, tl.sum(dweight, axis=0), mask=col_in)
    if HAS_BIAS:
        tl.store(dbias_ptr + at, tl.sum(dbias, axis=0), mask=col_in)


def _sum(partial: Tensor, parameter: Tensor) -> Tensor:
    return partial.sum(0).to(parameter.dtype)


def _tile(width: int, values: int) -> dict[str, int]:
    """Rows and columns of a program's tile: whole rows, of up to so many values."""
    cols = next_power_of_2(width)
    return {"ROWS": max(1, min(16, values // cols)), "COLS": cols}


def _num_warps(tile: dict[str, int], values: int) -> int:
    """Warps for so many values each; the backward pass holds more for a value than the forward."""
    return max(4, min(16, tile["ROWS"] * tile["COLS"] // values))
