"""``swiglu`` in C++.

Legend: R rows, F values in a row of the result.
"""

from pathlib import Path

import torch
from torch import Tensor

from fivefold.kernels import native
from fivefold.kernels.operands import dense_rows, sum_dtype

SOURCE = Path(__file__).with_suffix(".cpp")


def refuses(name: str, gate: Tensor, *_: object) -> str | None:
    """Dtypes that C++ has no name for, and machines that cannot compile it."""
    if gate.dtype not in native.TYPES:
        return f"it computes with {', '.join(map(str, native.TYPES))}, these are {gate.dtype}"
    return native.refusal(SOURCE)


def swiglu_forward(gate: Tensor, up: Tensor | None, row_scale: Tensor | None) -> Tensor:
    """The result (R, F)."""
    gate, up = _halves(gate, up)
    num_rows, width = gate.shape
    y = torch.empty((num_rows, width), dtype=gate.dtype)
    native.call(
        native.load(SOURCE).swiglu_forward,
        gate,
        up,
        _wide(row_scale, gate.dtype),
        y,
        num_rows,
        width,
        gate.stride(0),
        up.stride(0),
        native.TYPES[gate.dtype],
        torch.get_num_threads(),
    )
    return y


def swiglu_backward(
    dy: Tensor, gate: Tensor, up: Tensor | None, row_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``gate``, ``up`` and ``row_scale``; empty (0,) where absent."""
    dgate = torch.empty(gate.shape, dtype=gate.dtype)
    dup = gate.new_empty(0) if up is None else torch.empty_like(dgate)
    dgate_rf, dup_rf = _halves(dgate, None if up is None else dup)
    dy, (gate_rf, up_rf) = dense_rows(dy), _halves(gate, up)
    num_rows, width = dy.shape
    scale = _wide(row_scale, gate.dtype)
    sums = None if scale is None else torch.empty_like(scale)
    native.call(
        native.load(SOURCE).swiglu_backward,
        dy,
        gate_rf,
        up_rf,
        scale,
        dgate_rf,
        dup_rf,
        sums,
        num_rows,
        width,
        dy.stride(0),
        gate_rf.stride(0),
        up_rf.stride(0),
        dgate_rf.stride(0),
        native.TYPES[gate.dtype],
        torch.get_num_threads(),
    )
    if row_scale is None or sums is None:
        return dgate, dup, gate.new_empty(0)
    return dgate, dup, sums.to(row_scale.dtype)


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows of gate and of up, taken from one tensor where ``up`` is None."""
    if up is not None:
        return dense_rows(gate), dense_rows(up)
    gate = dense_rows(gate)
    width = gate.shape[1] // 2
    return gate[:, :width], gate[:, width:]


def _wide(row_scale: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if row_scale is None:
        return None
    return row_scale.to(sum_dtype(dtype)).contiguous()
