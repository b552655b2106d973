"""``rms_norm`` in C++, see cpu.cpp: rows stay in the cache between the passes over them.

Legend: R rows, N values in a row, G groups in a row.
"""

from pathlib import Path

import torch
from torch import Tensor

from fivefold.kernels import native
from fivefold.kernels.operands import dense_rows, sum_dtype

SOURCE = Path(__file__).with_suffix(".cpp")


def refuses(name: str, *inputs: object) -> str | None:
    """Dtypes that differ, and machines where the file cannot be compiled."""
    dtypes = {each.dtype for each in _rows_of(name, inputs)}
    if len(dtypes) > 1 or not dtypes <= native.TYPES.keys():
        found = ", ".join(sorted(str(each) for each in dtypes))
        return f"its kernel takes rows of one dtype of float16 to float64, these are {found}"
    return native.refusal(SOURCE)


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
    wide = sum_dtype(x.dtype)
    y = torch.empty((num_rows, width), dtype=x.dtype)
    rstd = torch.empty((num_rows, width // max(group_size, 1)), dtype=wide)
    native.call(
        native.load(SOURCE).rms_norm_forward,
        native.TYPES[x.dtype],
        x,
        None if weight is None else weight.to(wide).contiguous(),
        gate,
        y,
        rstd,
        _scratch(gate, group_size, wide),
        num_rows,
        width,
        group_size,
        x.stride(0),
        0 if gate is None else gate.stride(0),
        float(eps),
        gate_first,
        torch.get_num_threads(),
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
    num_threads = torch.get_num_threads()
    dx = torch.empty((num_rows, width), dtype=x.dtype)
    dgate = torch.empty(0 if gate is None else (num_rows, width), dtype=x.dtype)
    # One row of sums for each thread; the first then holds the sum of all.
    partial = torch.empty((0 if weight is None else num_threads, width), dtype=rstd.dtype)
    native.call(
        native.load(SOURCE).rms_norm_backward,
        native.TYPES[x.dtype],
        dy,
        x,
        None if weight is None else weight.to(rstd.dtype).contiguous(),
        gate,
        rstd.contiguous(),
        dx,
        None if weight is None else partial,
        dgate,
        _scratch(gate, group_size, rstd.dtype),
        num_rows,
        width,
        group_size,
        dy.stride(0),
        x.stride(0),
        0 if gate is None else gate.stride(0),
        gate_first,
        num_threads,
    )
    dweight = x.new_empty(0) if weight is None else partial[0].to(weight.dtype)
    return dx, dweight, dgate


def _scratch(gate: Tensor | None, group_size: int, dtype: torch.dtype) -> Tensor | None:
    """Some groups for each thread, kept from one pass over them to the next."""
    num_threads = torch.get_num_threads()
    return None if gate is None else torch.empty((num_threads, 4, group_size), dtype=dtype)


def _rows_of(name: str, inputs: tuple[object, ...]) -> list[Tensor]:
    """The tensors (R, N) among the inputs of an op."""
    found = (inputs[0], inputs[2]) if name == "rms_norm_forward" else (*inputs[:2], inputs[3])
    return [each for each in found if isinstance(each, Tensor)]
