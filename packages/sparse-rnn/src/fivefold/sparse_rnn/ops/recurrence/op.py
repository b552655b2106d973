"""``recurrence`` as registered ops: shapes for tracing, gradients, checks.

Legend: T steps, B sequences, H hidden units, G gates, R = G*H rows, N nonzeros, S saved values.
"""

from typing import Any

import torch
from torch import Tensor

from fivefold.kernels.derivatives import wants_gradient
from fivefold.kernels.errors import KernelInputError
from fivefold.kernels.op import define
from fivefold.sparse_rnn.ops.recurrence.cells import CELLS

BACKENDS = ("cuda", "triton", "cpu", "reference")


@define("fivefold_sparse_rnn", backends=BACKENDS)
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
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs (T, B, H), last h and c (B, H), and what the gradient needs (T, B, S*H)."""
    num_steps, batch, _ = gates.shape
    hidden = h0.shape[1]
    saved = CELLS[cell].num_saved * hidden
    wide = torch.promote_types(gates.dtype, torch.float32)
    return (
        gates.new_empty((num_steps, batch, hidden)),
        h0.new_empty((batch, hidden)),
        h0.new_empty((0,)) if c0 is None else c0.new_empty((batch, hidden)),
        gates.new_empty((num_steps, batch, saved) if keep and saved else (0,), dtype=wide),
    )


@define("fivefold_sparse_rnn", backends=BACKENDS)
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
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gates, h0, c0, values and bias_n; empty (0,) where there is none."""
    num_steps, batch, hidden = y.shape
    rows = CELLS[cell].num_gates * hidden
    return (
        y.new_empty((num_steps, batch, rows)),
        h0.new_empty((batch, hidden)),
        h0.new_empty((0,)) if c0 is None else c0.new_empty((batch, hidden)),
        values.new_empty(values.shape),
        values.new_empty((hidden,) if cell == "gru" else (0,)),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, h0, c0, values, crow, col, bias_n, lengths, ctx.cell, ctx.reverse, _, ctx.backend = inputs
    y, _, _, saved = output
    ctx.mark_non_differentiable(saved)
    ctx.has_bias = bias_n is not None
    ctx.save_for_backward(y, saved, h0, c0, values, crow, col, lengths)


def _backward(
    ctx: Any, dy: Tensor, dh_n: Tensor, dc_n: Tensor, _: Tensor
) -> tuple[Tensor | None, ...]:
    y, saved, h0, c0, values, crow, col, lengths = ctx.saved_tensors
    dgates, dh0, dc0, dvalues, dbias = recurrence_backward(
        dy,
        dh_n,
        None if c0 is None else dc_n,
        y,
        saved,
        h0,
        c0,
        values,
        crow,
        col,
        lengths,
        ctx.cell,
        ctx.reverse,
        ctx.backend,
    )
    dc0, dbias = None if c0 is None else dc0, dbias if ctx.has_bias else None
    nones = (None,) * 5
    return dgates, dh0, dc0, dvalues, None, None, dbias, *nones


recurrence_forward.differentiate(_save, _backward)


def apply(
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
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``recurrence``: check, run, keep what a gradient needs where one may be asked for."""
    check(gates, h0, c0, values, crow, col, bias_n, lengths, cell)
    keep = any(wants_gradient(x) for x in (gates, h0, c0, values, bias_n))
    y, h_n, c_n, _ = recurrence_forward(
        gates, h0, c0, values, crow, col, bias_n, lengths, cell, reverse, keep, backend
    )
    return y, h_n, c_n


def check(
    gates: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias_n: Tensor | None,
    lengths: Tensor | None,
    cell: str,
) -> None:
    """Raise ``KernelInputError`` unless shapes and dtypes fit together."""
    if cell not in CELLS:
        raise KernelInputError(f"recurrence knows the cells {', '.join(CELLS)}, found {cell!r}")
    if gates.dim() != 3 or h0.dim() != 2:
        raise KernelInputError(
            f"recurrence takes gates (T, B, G*H) and h0 (B, H), found {_shape(gates)} and "
            f"{_shape(h0)}"
        )
    batch, hidden = h0.shape
    rows = CELLS[cell].num_gates * hidden
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "gates": (gates, (gates.shape[0], batch, rows)),
        "c0": (c0, (batch, hidden)),
        "crow": (crow, (rows + 1,)),
        "col": (col, tuple(values.shape)),
        "bias_n": (bias_n, (hidden,)),
        "lengths": (lengths, (batch,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise KernelInputError(
                f"recurrence of {cell} with {batch} sequences and {hidden} units takes {name} of "
                f"shape {shape}, found {_shape(tensor)}"
            )
    if CELLS[cell].has_memory != (c0 is not None):
        raise KernelInputError(
            f"recurrence takes c0 for lstm and for no other cell, this is {cell}"
        )
    if bias_n is not None and cell != "gru":
        raise KernelInputError(f"recurrence takes bias_n for gru and for no other cell, not {cell}")
    _check_dtypes(gates, values, crow, col)


def _check_dtypes(gates: Tensor, values: Tensor, crow: Tensor, col: Tensor) -> None:
    if not (gates.is_floating_point() and values.is_floating_point()):
        raise KernelInputError(
            f"recurrence takes floating-point gates and values, found {gates.dtype} and "
            f"{values.dtype}"
        )
    if crow.dtype != torch.int32 or col.dtype != torch.int32:
        raise KernelInputError(
            f"recurrence takes crow and col in int32, found {crow.dtype} and {col.dtype}"
        )


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)
