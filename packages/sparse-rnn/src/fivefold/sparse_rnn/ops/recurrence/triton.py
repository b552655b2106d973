"""One step of ``recurrence`` as a Triton kernel: a launch for each step.

A program has some hidden units of one sequence with all their gates; it walks along their rows, as
many nonzeros of each at a time as a tile is wide. Backwards it walks along the columns.

Legend: T steps, B sequences, H hidden units, G gates, R = G*H rows, N nonzeros, S saved values.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fivefold.kernels.launch import launch
from fivefold.kernels.triton_parts import sigmoid
from fivefold.sparse_rnn.ops.recurrence.cells import CELLS
from fivefold.sparse_rnn.ops.recurrence.reference import previous, rows_of

# Units of a program and nonzeros of a row that it takes at once.
_UNITS, _WIDTH, _COUNT = 16, 64, 128

_turned: WeakIdKeyDictionary = WeakIdKeyDictionary()


@triton.jit
def _tanh(x):
    return 2 * sigmoid(2 * x) - 1


@triton.jit
def _sums(values_ptr, begin_ptr, index_ptr, from_ptr, rows, inside, WIDTH: tl.constexpr):
    """Products of some rows with a vector."""
    begin = tl.load(begin_ptr + rows, mask=inside, other=0)
    end = tl.load(begin_ptr + rows + 1, mask=inside, other=0)
    acc = tl.zeros(rows.shape, dtype=from_ptr.dtype.element_ty)
    longest = tl.max(end - begin, axis=0)
    for first in range(0, longest, WIDTH):
        at = begin[:, None] + first + tl.arange(0, WIDTH)[None, :]
        there = at < end[:, None]
        value = tl.load(values_ptr + at, mask=there, other=0).to(acc.dtype)
        index = tl.load(index_ptr + at, mask=there, other=0)
        acc += tl.sum(value * tl.load(from_ptr + index), axis=1)
    return acc


@triton.jit
def _forward(
    gates_ptr,
    values_ptr,
    crow_ptr,
    col_ptr,
    bias_ptr,
    lengths_ptr,
    h_ptr,
    c_ptr,
    h_new_ptr,
    c_new_ptr,
    y_ptr,
    saved_ptr,
    t,
    hidden,
    CELL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    KEEP: tl.constexpr,
    UNITS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    batch = tl.num_programs(1)
    units = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    inside = units < hidden
    num_gates: tl.constexpr = 4 if CELL == 2 else 3 if CELL == 3 else 1
    num_saved: tl.constexpr = 5 if CELL == 2 else 4 if CELL == 3 else 0
    at = b * hidden + units
    step = (t * batch + b).to(tl.int64)
    gates = gates_ptr + step * num_gates * hidden + units
    saved = saved_ptr + step * num_saved * hidden + units
    vector = h_ptr + b * hidden
    active = True
    if HAS_LENGTHS:
        active = t < tl.load(lengths_ptr + b)
    h = tl.load(h_ptr + at, mask=inside, other=0)
    x0 = tl.load(gates, mask=inside, other=0).to(h.dtype)
    s0 = _sums(values_ptr, crow_ptr, col_ptr, vector, units, inside, WIDTH)
    if CELL >= 2:
        x1 = tl.load(gates + hidden, mask=inside, other=0).to(h.dtype)
        x2 = tl.load(gates + 2 * hidden, mask=inside, other=0).to(h.dtype)
        rows1, rows2 = units + hidden, units + 2 * hidden
        s1 = _sums(values_ptr, crow_ptr, col_ptr, vector, rows1, inside, WIDTH)
        s2 = _sums(values_ptr, crow_ptr, col_ptr, vector, rows2, inside, WIDTH)
        first, second = sigmoid(x0 + s0), sigmoid(x1 + s1)
    if CELL == 0:
        h_new = _tanh(x0 + s0)
    elif CELL == 1:
        h_new = tl.where(x0 + s0 < 0, 0.0, x0 + s0)
    elif CELL == 2:
        x3 = tl.load(gates + 3 * hidden, mask=inside, other=0).to(h.dtype)
        rows3 = units + 3 * hidden
        s3 = _sums(values_ptr, crow_ptr, col_ptr, vector, rows3, inside, WIDTH)
        g, o = _tanh(x2 + s2), sigmoid(x3 + s3)
        c = tl.load(c_ptr + at, mask=inside, other=0)
        c_new = second * c + first * g
        h_new = o * _tanh(c_new)
        tl.store(c_new_ptr + at, tl.where(active, c_new, c), mask=inside)
        if KEEP:
            tl.store(saved, first, mask=inside)
            tl.store(saved + hidden, second, mask=inside)
            tl.store(saved + 2 * hidden, g, mask=inside)
            tl.store(saved + 3 * hidden, o, mask=inside)
            tl.store(saved + 4 * hidden, c_new, mask=inside)
    else:
        if HAS_BIAS:
            s2 += tl.load(bias_ptr + units, mask=inside, other=0).to(h.dtype)
        n = _tanh(x2 + first * s2)
        h_new = n + second * (h - n)
        if KEEP:
            tl.store(saved, first, mask=inside)
            tl.store(saved + hidden, second, mask=inside)
            tl.store(saved + 2 * hidden, n, mask=inside)
            tl.store(saved + 3 * hidden, s2, mask=inside)
    tl.store(h_new_ptr + at, tl.where(active, h_new, h), mask=inside)
    tl.store(y_ptr + step * hidden + units, tl.where(active, h_new, 0.0), mask=inside)


@triton.jit
def _backward(
    dy_ptr,
    y_ptr,
    saved_ptr,
    before_ptr,
    c_before_ptr,
    values_ptr,
    ccol_ptr,
    row_ptr,
    lengths_ptr,
    drows_before_ptr,
    dh_ptr,
    dc_ptr,
    dgates_ptr,
    drows_ptr,
    t,
    hidden,
    CELL: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    UNITS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    batch = tl.num_programs(1)
    units = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    inside = units < hidden
    num_gates: tl.constexpr = 4 if CELL == 2 else 3 if CELL == 3 else 1
    num_saved: tl.constexpr = 5 if CELL == 2 else 4 if CELL == 3 else 0
    at = b * hidden + units
    dh = tl.load(dh_ptr + at, mask=inside, other=0)
    if not FIRST:
        vector = drows_before_ptr + b * num_gates * hidden
        dh += _sums(values_ptr, ccol_ptr, row_ptr, vector, units, inside, WIDTH)
    if LAST:
        tl.store(dh_ptr + at, dh, mask=inside)
    else:
        active = 1.0
        if HAS_LENGTHS:
            active = tl.where(t < tl.load(lengths_ptr + b), 1.0, 0.0)
        step = (t * batch + b).to(tl.int64)
        saved = saved_ptr + step * num_saved * hidden + units
        dgates = dgates_ptr + step * num_gates * hidden + units
        drows = drows_ptr + b * num_gates * hidden + units
        along = step * hidden + units
        total = (dh + tl.load(dy_ptr + along, mask=inside, other=0)) * active
        through = dh * (1 - active)
        if CELL < 2:
            y = tl.load(y_ptr + along, mask=inside, other=0)
            dx = total * (1 - y * y) if CELL == 0 else tl.where(y > 0, total, 0.0)
            tl.store(dgates, dx, mask=inside)
            tl.store(drows, dx, mask=inside)
        else:
            s0 = tl.load(saved, mask=inside, other=0)
            s1 = tl.load(saved + hidden, mask=inside, other=0)
            s2 = tl.load(saved + 2 * hidden, mask=inside, other=0)
            s3 = tl.load(saved + 3 * hidden, mask=inside, other=0)
            if CELL == 2:
                tanh = _tanh(tl.load(saved + 4 * hidden, mask=inside, other=0))
                dc = tl.load(dc_ptr + at, mask=inside, other=0)
                dc_new = dc * active + total * s3 * (1 - tanh * tanh)
                c_before = tl.load(c_before_ptr + along, mask=inside, other=0)
                d0 = dc_new * s2 * s0 * (1 - s0)
                d1 = dc_new * c_before * s1 * (1 - s1)
                d2 = dc_new * s0 * (1 - s2 * s2)
                d3 = total * tanh * s3 * (1 - s3)
                tl.store(dc_ptr + at, dc_new * s1 + dc * (1 - active), mask=inside)
                tl.store(dgates + 3 * hidden, d3, mask=inside)
                tl.store(drows + 3 * hidden, d3, mask=inside)
                tl.store(drows + 2 * hidden, d2, mask=inside)
            else:
                d2 = total * (1 - s1) * (1 - s2 * s2)
                before = tl.load(before_ptr + along, mask=inside, other=0)
                d1 = total * (before - s2) * s1 * (1 - s1)
                d0 = d2 * s3 * s0 * (1 - s0)
                tl.store(drows + 2 * hidden, d2 * s0, mask=inside)
                through += total * s1
            tl.store(dgates, d0, mask=inside)
            tl.store(dgates + hidden, d1, mask=inside)
            tl.store(dgates + 2 * hidden, d2, mask=inside)
            tl.store(drows, d0, mask=inside)
            tl.store(drows + hidden, d1, mask=inside)
        tl.store(dh_ptr + at, through, mask=inside)


@triton.jit
def _products(
    drows_ptr,
    before_ptr,
    row_ptr,
    col_ptr,
    out_ptr,
    count,
    num_nonzeros,
    num_rows,
    hidden,
    COUNT: tl.constexpr,
):
    at = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    inside = at < num_nonzeros
    row = tl.load(row_ptr + at, mask=inside, other=0)
    col = tl.load(col_ptr + at, mask=inside, other=0)
    acc = tl.zeros((COUNT,), dtype=drows_ptr.dtype.element_ty)
    for k in range(count):
        left = tl.load(drows_ptr + k * num_rows + row, mask=inside, other=0)
        acc += left * tl.load(before_ptr + k * hidden + col, mask=inside, other=0)
    tl.store(out_ptr + at, acc, mask=inside)


def recurrence_forward(
    gates: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias_n: Tensor | None,
    lengths: Tensor | None,
    cell: str,
    reverse: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs (T, B, H), last h and c (B, H), and what the gradient needs (T, B, S*H)."""
    num_steps, batch, _ = gates.shape
    hidden, wide = h0.shape[1], _wide(gates, h0, values)
    gates, values = gates.contiguous(), values.contiguous()
    lengths = None if lengths is None else lengths.contiguous()
    h, h_new = _copy(h0, wide), torch.empty_like(h0, dtype=wide)
    c = h.new_empty(0) if c0 is None else _copy(c0, wide)
    c_new = torch.empty_like(c)
    y = gates.new_empty((num_steps, batch, hidden), dtype=wide)
    num_saved = CELLS[cell].num_saved * hidden if keep else 0
    saved = gates.new_empty((num_steps, batch, num_saved) if num_saved else (0,), dtype=wide)
    grid = (triton.cdiv(hidden, _UNITS), batch)
    for t in range(num_steps - 1, -1, -1) if reverse else range(num_steps):
        launch(
            _forward,
            grid,
            gates,
            values,
            crow,
            col,
            None if bias_n is None else bias_n.contiguous(),
            lengths,
            h,
            c,
            h_new,
            c_new,
            y,
            saved,
            t,
            hidden,
            CELL=CELLS[cell].number,
            HAS_BIAS=bias_n is not None,
            HAS_LENGTHS=lengths is not None,
            KEEP=num_saved > 0,
            UNITS=_UNITS,
            WIDTH=_WIDTH,
        )
        h, h_new, c, c_new = h_new, h, c_new, c
    c_n = h0.new_empty(0) if c0 is None else c.to(c0.dtype)
    kept = saved.to(torch.promote_types(gates.dtype, torch.float32))
    return y.to(gates.dtype), h.to(h0.dtype), c_n, kept


def recurrence_backward(
    dy: Tensor,
    dh_n: Tensor,
    dc_n: Tensor | None,
    y: Tensor,
    saved: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    lengths: Tensor | None,
    cell: str,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gates, h0, c0, values and bias_n; empty (0,) where there is none."""
    num_steps, batch, hidden = y.shape
    wide = _wide(y, h0, values)
    order, ccol, row = _turn(crow, col, hidden)
    by_column = values.contiguous() if values.is_meta else values[order]
    before = previous(y.to(wide), h0.to(wide), lengths, reverse).contiguous()
    c_before = _c_before(saved, c0, lengths, reverse, wide)
    saved, dy, y_wide = saved.to(wide).contiguous(), dy.to(wide).contiguous(), y.to(wide)
    dh, dc = _copy(dh_n, wide), dh_n.new_empty(0) if dc_n is None else _copy(dc_n, wide)
    num_rows = crow.shape[0] - 1
    dgates = dy.new_empty((num_steps, batch, num_rows))
    drows = dy.new_empty((2, batch, num_rows))
    all_drows = dgates if cell != "gru" else torch.empty_like(dgates)
    lengths = None if lengths is None else lengths.contiguous()
    grid = (triton.cdiv(hidden, _UNITS), batch)
    steps = range(num_steps) if reverse else range(num_steps - 1, -1, -1)
    for number, t in enumerate([*steps, 0]):
        launch(
            _backward,
            grid,
            dy,
            y_wide.contiguous(),
            saved,
            before,
            c_before,
            by_column,
            ccol,
            row,
            lengths,
            drows[(number + 1) % 2],
            dh,
            dc,
            dgates,
            drows[number % 2],
            t,
            hidden,
            CELL=CELLS[cell].number,
            HAS_LENGTHS=lengths is not None,
            FIRST=number == 0,
            LAST=number == num_steps,
            UNITS=_UNITS,
            WIDTH=_WIDTH,
        )
        if cell == "gru" and number < num_steps:
            all_drows[t] = drows[number % 2]
    dvalues = dgates.new_empty(col.shape)
    nonzeros = col.shape[0]
    launch(
        _products,
        (triton.cdiv(nonzeros, _COUNT),),
        all_drows,
        before,
        rows_of(crow, col).to(torch.int32),
        col,
        dvalues,
        num_steps * batch,
        nonzeros,
        num_rows,
        hidden,
        COUNT=_COUNT,
    )
    dbias = all_drows[..., 2 * hidden :].sum((0, 1)) if cell == "gru" else values.new_empty(0)
    return (
        dgates.to(y.dtype),
        dh.to(h0.dtype),
        h0.new_empty(0) if c0 is None else dc.to(c0.dtype),
        dvalues.to(values.dtype),
        dbias.to(values.dtype),
    )


def _turn(crow: Tensor, col: Tensor, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    """The order (N,) by columns; where columns begin (H + 1,); their rows (N,)."""
    if col.is_meta:
        return col, crow[: hidden + 1], col
    if col not in _turned:
        order = col.argsort(stable=True)
        begin = torch.zeros(hidden + 1, dtype=torch.int32, device=col.device)
        begin[1:] = col.long().bincount(minlength=hidden).cumsum(0)
        _turned[col] = (order, begin, rows_of(crow, col)[order].to(torch.int32))
    turned: Any = _turned[col]
    return turned


def _c_before(
    saved: Tensor, c0: Tensor | None, lengths: Tensor | None, reverse: bool, wide: torch.dtype
) -> Tensor:
    """The cell state (T, B, H) that each step began with; empty without one."""
    if c0 is None:
        return saved.new_empty(0, dtype=wide)
    c = saved[..., 4 * c0.shape[1] :].to(wide)
    return previous(c, c0.to(wide), lengths, reverse).contiguous()


def _wide(*tensors: Tensor) -> torch.dtype:
    """In what is computed: float64 where anything is, else float32."""
    doubles = any(each.dtype == torch.float64 for each in tensors)
    return torch.float64 if doubles else torch.float32


def _copy(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format).copy_(x)
