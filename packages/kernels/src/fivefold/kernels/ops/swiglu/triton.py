"""``swiglu`` in Triton: tiles of some rows and columns, each value read and written once.

Legend: R rows, F values in a row of the result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fivefold.kernels.launch import launch
from fivefold.kernels.operands import dense_rows
from fivefold.kernels.sizes import next_power_of_2
from fivefold.kernels.triton_parts import accumulator, sigmoid

# 16 values a thread: two accesses of 16 bytes in bfloat16.
_TILE, _LARGEST_COLS, _NUM_WARPS = 2048, 512, 4


def swiglu_forward(gate: Tensor, up: Tensor | None, row_scale: Tensor | None) -> Tensor:
    """The result (R, F)."""
    gate, up = _halves(gate, up)
    num_rows, width = gate.shape
    y = torch.empty((num_rows, width), dtype=gate.dtype, device=gate.device)
    tile = _tile(width)
    col_blocks = triton.cdiv(width, tile["COLS"])
    launch(
        _forward_kernel,
        (triton.cdiv(num_rows, tile["ROWS"]) * col_blocks,),
        gate,
        up,
        None if row_scale is None else row_scale.contiguous(),
        y,
        num_rows,
        width,
        col_blocks,
        gate.stride(0),
        up.stride(0),
        HAS_SCALE=row_scale is not None,
        COMPUTE=accumulator(gate.dtype),
        num_warps=_NUM_WARPS,
        **tile,
    )
    return y


def swiglu_backward(
    dy: Tensor, gate: Tensor, up: Tensor | None, row_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``gate``, ``up`` and ``row_scale``; empty (0,) where absent."""
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = gate.new_empty(0) if up is None else torch.empty_like(dgate)
    dgate_rf, dup_rf = _halves(dgate, None if up is None else dup)
    dy, (gate_rf, up_rf) = dense_rows(dy), _halves(gate, up)
    num_rows, width = dy.shape
    tile, compute = _tile(width), accumulator(gate.dtype)
    col_blocks = triton.cdiv(width, tile["COLS"])
    partial = None
    if row_scale is not None:
        sums = torch.float64 if compute is tl.float64 else torch.float32
        partial = torch.empty((col_blocks, num_rows), dtype=sums, device=gate.device)
    launch(
        _backward_kernel,
        (triton.cdiv(num_rows, tile["ROWS"]) * col_blocks,),
        dy,
        gate_rf,
        up_rf,
        None if row_scale is None else row_scale.contiguous(),
        dgate_rf,
        dup_rf,
        partial,
        num_rows,
        width,
        col_blocks,
        dy.stride(0),
        gate_rf.stride(0),
        up_rf.stride(0),
        dgate_rf.stride(0),
        HAS_SCALE=row_scale is not None,
        COMPUTE=compute,
        num_warps=_NUM_WARPS,
        **tile,
    )
    dscale = gate.new_empty(0)
    if row_scale is not None and partial is not None:
        dscale = partial.sum(0).to(row_scale.dtype)
    return dgate, dup, dscale


@triton.jit
def _forward_kernel(
    gate_ptr,
    up_ptr,
    scale_ptr,
    y_ptr,
    num_rows,
    width,
    col_blocks,
    gate_stride,
    up_stride,
    HAS_SCALE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    # Columns first, so that programs that run together read rows from end to end.
    rows = (tl.program_id(0) // col_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = (tl.program_id(0) % col_blocks) * COLS + tl.arange(0, COLS)
    row_in = rows < num_rows
    inside = row_in[:, None] & (cols < width)[None, :]
    gate = tl.load(gate_ptr + rows[:, None] * gate_stride + cols[None, :], mask=inside, other=0)
    up = tl.load(up_ptr + rows[:, None] * up_stride + cols[None, :], mask=inside, other=0)
    gate, up = gate.to(COMPUTE), up.to(COMPUTE)
    y = gate * sigmoid(gate) * up
    if HAS_SCALE:
        scale = tl.load(scale_ptr + rows, mask=row_in, other=0).to(COMPUTE)
        y *= scale[:, None]
    y_at = y_ptr + rows[:, None] * width + cols[None, :]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    dy_ptr,
    gate_ptr,
    up_ptr,
    scale_ptr,
    dgate_ptr,
    dup_ptr,
    partial_ptr,
    num_rows,
    width,
    col_blocks,
    dy_stride,
    gate_stride,
    up_stride,
    out_stride,
    HAS_SCALE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    col_block = tl.program_id(0) % col_blocks
    rows = (tl.program_id(0) // col_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = col_block * COLS + tl.arange(0, COLS)
    row_in = rows < num_rows
    inside = row_in[:, None] & (cols < width)[None, :]
    dy = tl.load(dy_ptr + rows[:, None] * dy_stride + cols[None, :], mask=inside, other=0)
    gate = tl.load(gate_ptr + rows[:, None] * gate_stride + cols[None, :], mask=inside, other=0)
    up = tl.load(up_ptr + rows[:, None] * up_stride + cols[None, :], mask=inside, other=0)
    dy, gate, up = dy.to(COMPUTE), gate.to(COMPUTE), up.to(COMPUTE)
    logistic = sigmoid(gate)
    silu = gate * logistic
    if HAS_SCALE:
        dscale = tl.sum(dy * silu * up, axis=1)
        at = partial_ptr + col_block.to(tl.int64) * num_rows + rows
        tl.store(at, dscale, mask=row_in)
        dy *= tl.load(scale_ptr + rows, mask=row_in, other=0).to(COMPUTE)[:, None]
    dgate = dy * up * logistic * (1 + gate * (1 - logistic))
    out = rows[:, None] * out_stride + cols[None, :]
    tl.store(dgate_ptr + out, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + out, (dy * silu).to(dup_ptr.dtype.element_ty), mask=inside)


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows of gate and of up, taken from one tensor where ``up`` is None."""
    if up is not None:
        return dense_rows(gate), dense_rows(up)
    gate = dense_rows(gate)
    width = gate.shape[1] // 2
    return gate[:, :width], gate[:, width:]


def _tile(width: int) -> dict[str, int]:
    cols = min(next_power_of_2(width), _LARGEST_COLS)
    return {"ROWS": min(_TILE // cols, 16), "COLS": cols}
