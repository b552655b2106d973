"""``rms_norm`` in Triton: tiles of whole groups of some rows, loaded once.

The backward pass walks many rows in each program, so that the weight's gradient is summed in
registers and leaves one partial row a program.

Legend: R rows, G groups in a row, S values in a group.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fivefold.kernels.launch import launch, num_sms
from fivefold.kernels.operands import dense_rows, sum_dtype
from fivefold.kernels.sizes import next_power_of_2
from fivefold.kernels.triton_parts import accumulator, sigmoid

# A program holds a tile in registers: more values than this would spill.
_LARGEST_GROUP = 16384


def refuses(name: str, *inputs: Any) -> str | None:
    """Groups that do not fit the registers of one program."""
    group_size = inputs[-1]
    if group_size > _LARGEST_GROUP:
        return f"its kernel takes groups of up to {_LARGEST_GROUP} values, these have {group_size}"
    return None


def rms_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    eps: float,
    gate_first: bool,
    group_size: int,
) -> tuple[Tensor, Tensor]:
    """The result (R, N) and 1/rms (R, G)."""
    x, gate = dense_rows(x), None if gate is None else dense_rows(gate)
    num_rows, width = x.shape
    num_groups = width // max(group_size, 1)
    y = torch.empty((num_rows, width), dtype=x.dtype, device=x.device)
    compute = accumulator(x.dtype)
    rstd_dtype = sum_dtype(x.dtype)
    rstd = torch.empty((num_rows, num_groups), dtype=rstd_dtype, device=x.device)
    tile = _tile(group_size, values=4096)
    launch(
        _forward_kernel,
        (triton.cdiv(num_rows, tile["ROWS"]), num_groups),
        x,
        weight,
        gate,
        y,
        rstd,
        num_rows,
        group_size,
        x.stride(0),
        0 if gate is None else gate.stride(0),
        num_groups,
        eps,
        HAS_WEIGHT=weight is not None,
        HAS_GATE=gate is not None,
        GATE_FIRST=gate_first,
        COMPUTE=compute,
        num_warps=_num_warps(tile, values=1024),
        **tile,
    )
    return y, rstd


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    rstd: Tensor,
    gate_first: bool,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``weight`` and ``gate``; empty (0,) where absent."""
    dy, x, gate = (
        dense_rows(dy),
        dense_rows(x),
        None if gate is None else dense_rows(gate),
    )
    num_rows, width = x.shape
    num_groups = width // max(group_size, 1)
    tile = _tile(group_size, values=4096)
    row_blocks = triton.cdiv(num_rows, tile["ROWS"])
    programs = min(row_blocks, max(1, 4 * num_sms(x) // max(num_groups, 1)))
    dx = torch.empty((num_rows, width), dtype=x.dtype, device=x.device)
    dgate = x.new_empty(0) if gate is None else torch.empty_like(dx, dtype=gate.dtype)
    partial = None
    if weight is not None:
        partial = torch.empty((programs, width), dtype=rstd.dtype, device=x.device)
    launch(
        _backward_kernel,
        (programs, num_groups),
        dy,
        x,
        weight,
        gate,
        rstd,
        dx,
        dgate,
        partial,
        num_rows,
        group_size,
        dy.stride(0),
        x.stride(0),
        0 if gate is None else gate.stride(0),
        num_groups,
        HAS_WEIGHT=weight is not None,
        HAS_GATE=gate is not None,
        GATE_FIRST=gate_first,
        COMPUTE=accumulator(x.dtype),
        num_warps=_num_warps(tile, values=512),
        **tile,
    )
    dweight = x.new_empty(0)
    if weight is not None and partial is not None:
        dweight = partial.sum(0).to(weight.dtype)
    return dx, dweight, dgate


@triton.jit
def _forward_kernel(
    x_ptr,
    weight_ptr,
    gate_ptr,
    y_ptr,
    rstd_ptr,
    num_rows,
    group_size,
    x_stride,
    gate_stride,
    num_groups,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_GATE: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    group = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    cols = tl.arange(0, COLS)
    row_in, col_in = rows < num_rows, cols < group_size
    inside = row_in[:, None] & col_in[None, :]
    values = group * group_size + cols

    x = tl.load(x_ptr + rows[:, None] * x_stride + values[None, :], mask=inside, other=0)
    x = x.to(COMPUTE)
    if HAS_GATE:
        z = tl.load(gate_ptr + rows[:, None] * gate_stride + values[None, :], mask=inside, other=0)
        z = z.to(COMPUTE)
        silu = z * sigmoid(z)
        if GATE_FIRST:
            x *= silu
    rstd = 1 / tl.sqrt(tl.sum(x * x, axis=1) / group_size + eps)
    tl.store(rstd_ptr + rows * num_groups + group, rstd, mask=row_in)
    y = x * rstd[:, None]
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + values, mask=col_in, other=0).to(COMPUTE)
        y *= weight[None, :]
    if HAS_GATE and not GATE_FIRST:
        y *= silu
    y_rows = rows[:, None] * (num_groups * group_size)
    tl.store(y_ptr + y_rows + values[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    gate_ptr,
    rstd_ptr,
    dx_ptr,
    dgate_ptr,
    partial_ptr,
    num_rows,
    group_size,
    dy_stride,
    x_stride,
    gate_stride,
    num_groups,
    HAS_WEIGHT: tl.constexpr,
    HAS_GATE: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    program, group = tl.program_id(0), tl.program_id(1)
    cols = tl.arange(0, COLS)
    col_in = cols < group_size
    values = group * group_size + cols
    width = num_groups * group_size
    weight = tl.full((COLS,), 1, COMPUTE)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + values, mask=col_in, other=0).to(COMPUTE)
    dweight = tl.zeros((ROWS, COLS), COMPUTE)

    for block in range(program, tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows = block * ROWS + tl.arange(0, ROWS).to(tl.int64)
        row_in = rows < num_rows
        inside = row_in[:, None] & col_in[None, :]
        dy = tl.load(dy_ptr + rows[:, None] * dy_stride + values[None, :], mask=inside, other=0)
        x = tl.load(x_ptr + rows[:, None] * x_stride + values[None, :], mask=inside, other=0)
        dy, x = dy.to(COMPUTE), x.to(COMPUTE)
        rstd = tl.load(rstd_ptr + rows * num_groups + group, mask=row_in, other=0)[:, None]
        dscaled, inner = dy, x
        if HAS_GATE:
            z_at = gate_ptr + rows[:, None] * gate_stride + values[None, :]
            z = tl.load(z_at, mask=inside, other=0).to(COMPUTE)
            logistic = sigmoid(z)
            silu = z * logistic
            slope = logistic * (1 + z * (1 - logistic))
            if GATE_FIRST:
                inner = x * silu
            else:
                dscaled = dy * silu
        normed = inner * rstd
        dweight += dscaled * normed
        dnormed = dscaled * weight[None, :]
        projection = tl.sum(dnormed * normed, axis=1) / group_size
        dx = (dnormed - normed * projection[:, None]) * rstd
        out = rows[:, None] * width + values[None, :]
        if HAS_GATE:
            if GATE_FIRST:
                dgate = dx * x * slope
                dx *= silu
            else:
                dgate = dy * normed * weight[None, :] * slope
            tl.store(dgate_ptr + out, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
        tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=inside)

    if HAS_WEIGHT:
        at = partial_ptr + program.to(tl.int64) * width + values
        tl.store(at, tl.sum(dweight, axis=0), mask=col_in)


def _tile(group_size: int, values: int) -> dict[str, int]:
    """Rows and columns of a program's tile: a whole group, and rows up to so many values."""
    cols = next_power_of_2(group_size)
    return {"ROWS": max(1, min(16, values // cols)), "COLS": cols}


def _num_warps(tile: dict[str, int], values: int) -> int:
    """Warps for so many values each; the backward pass holds more for a value than the forward."""
    return max(4, min(16, tile["ROWS"] * tile["COLS"] // values))
