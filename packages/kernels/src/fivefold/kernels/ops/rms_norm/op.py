"""``rms_norm`` as registered ops: shapes for tracing, gradients, checks.

Rows are what the leading dims span, and a row has one or more groups that are normalised by
themselves.

Legend: R rows, N values in a row, G groups in a row.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fivefold.kernels.errors import KernelInputError
from fivefold.kernels.op import define
from fivefold.kernels.operands import sum_dtype

BACKENDS = ("triton", "cpu", "reference")


@define("fivefold_kernels", backends=BACKENDS)
def rms_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    eps: float,
    gate_first: bool,
    group_size: int,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """``x`` and ``gate`` (R, N), ``weight`` (N,) to the result (R, N) and 1/rms (R, G)."""
    rstd_dtype = sum_dtype(x.dtype)
    groups = x.shape[1] // max(group_size, 1)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(x.shape[0], groups, dtype=rstd_dtype),
    )


@define("fivefold_kernels", backends=BACKENDS)
def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    rstd: Tensor,
    gate_first: bool,
    group_size: int,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x`` (R, N), ``weight`` (N,) and ``gate`` (R, N), empty (0,) where absent."""
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(0) if weight is None else torch.empty_like(weight),
        x.new_empty(0) if gate is None else gate.new_empty(gate.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, gate, _, ctx.gate_first, ctx.group_size, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, gate, output[1])


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, gate, rstd = ctx.saved_tensors
    dx, dweight, dgate = rms_norm_backward(
        dy, x, weight, gate, rstd, ctx.gate_first, ctx.group_size, ctx.backend
    )
    dweight, dgate = None if weight is None else dweight, None if gate is None else dgate
    return dx, dweight, dgate, None, None, None, None


rms_norm_forward.differentiate(_save, _backward)


def apply(
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    eps: float | None,
    gate: Tensor | None,
    gate_first: bool,
    group_size: int | None,
    backend: str | None,
) -> Tensor:
    """See ``rms_norm``: check, make rows, run, restore the shape."""
    check(input, normalized_shape, weight, gate, group_size)
    width = math.prod(normalized_shape)
    rows = math.prod(input.shape[: input.dim() - len(normalized_shape)])
    y, _ = rms_norm_forward(
        input.reshape(rows, width),
        None if weight is None else weight.reshape(width).contiguous(),
        None if gate is None else gate.reshape(rows, width),
        torch.finfo(input.dtype).eps if eps is None else eps,
        gate_first,
        width if group_size is None else group_size,
        backend,
    )
    return y.reshape(input.shape)


def check(
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    gate: Tensor | None,
    group_size: int | None,
) -> None:
    """Raise ``KernelInputError`` unless the shapes fit together."""
    if not input.is_floating_point():
        raise KernelInputError(f"rms_norm takes floating-point values, found {input.dtype}")
    if not normalized_shape or input.shape[-len(normalized_shape) :] != normalized_shape:
        raise KernelInputError(
            f"rms_norm normalises the last dims {normalized_shape}, found input of shape "
            f"{tuple(input.shape)}"
        )
    if weight is not None and weight.shape != normalized_shape:
        raise KernelInputError(
            f"rms_norm takes a weight of shape {normalized_shape}, found {tuple(weight.shape)}"
        )
    if gate is not None and gate.shape != input.shape:
        raise KernelInputError(
            f"rms_norm takes a gate of input's shape {tuple(input.shape)}, found "
            f"{tuple(gate.shape)}"
        )
    width = math.prod(normalized_shape)
    if group_size is not None and (group_size < 1 or width % group_size):
        raise KernelInputError(
            f"rms_norm was asked for groups of {group_size} values, which must divide the {width} "
            f"values of {normalized_shape}"
        )
