"""``swiglu`` as registered ops: shapes for tracing, gradients, checks.

Legend: R rows, F values in a row of the result.
"""

import math
from typing import Any

from torch import Tensor

from fivefold.kernels.errors import KernelInputError
from fivefold.kernels.op import define

BACKENDS = ("triton", "cpu", "reference")


@define("fivefold_kernels", backends=BACKENDS)
def swiglu_forward(
    gate: Tensor, up: Tensor | None, row_scale: Tensor | None, backend: str | None
) -> Tensor:
    """``gate`` and ``up`` (R, F) and ``row_scale`` (R,) to the result (R, F).

    Without ``up``, ``gate`` is (R, 2F).
    """
    return gate.new_empty(gate.shape[0], gate.shape[1] if up is not None else gate.shape[1] // 2)


@define("fivefold_kernels", backends=BACKENDS)
def swiglu_backward(
    dy: Tensor, gate: Tensor, up: Tensor | None, row_scale: Tensor | None, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``gate``, ``up`` and ``row_scale``; empty (0,) where absent."""
    return (
        gate.new_empty(gate.shape),
        gate.new_empty(0) if up is None else up.new_empty(up.shape),
        gate.new_empty(0) if row_scale is None else row_scale.new_empty(row_scale.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, row_scale, ctx.backend = inputs
    ctx.save_for_backward(gate, up, row_scale)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    gate, up, row_scale = ctx.saved_tensors
    dgate, dup, dscale = swiglu_backward(dy, gate, up, row_scale, ctx.backend)
    return dgate, None if up is None else dup, None if row_scale is None else dscale, None


swiglu_forward.differentiate(_save, _backward)


def apply(gate: Tensor, up: Tensor | None, row_scale: Tensor | None, backend: str | None) -> Tensor:
    """See ``swiglu``: check, make rows, run, restore the shape."""
    check(gate, up, row_scale)
    rows = math.prod(gate.shape[:-1])
    y = swiglu_forward(
        gate.reshape(rows, gate.shape[-1]),
        None if up is None else up.reshape(rows, up.shape[-1]),
        None if row_scale is None else row_scale.reshape(rows),
        backend,
    )
    return y.reshape(*gate.shape[:-1], y.shape[1])


def check(gate: Tensor, up: Tensor | None, row_scale: Tensor | None) -> None:
    """Raise ``KernelInputError`` unless the inputs fit together."""
    if not gate.is_floating_point() or gate.dim() == 0:
        raise KernelInputError(
            f"swiglu takes floating-point values (..., F), found {gate.dtype} of shape "
            f"{tuple(gate.shape)}"
        )
    if up is None and gate.shape[-1] % 2:
        raise KernelInputError(
            "swiglu without up takes gate and up as the halves of one last dim, found the odd size "
            f"{gate.shape[-1]}"
        )
    if up is not None and (up.shape, up.dtype, up.device) != (gate.shape, gate.dtype, gate.device):
        raise KernelInputError(f"swiglu takes an up like gate, {_like(gate)}, found {_like(up)}")
    if row_scale is not None:
        _check_row_scale(gate, row_scale)


def _check_row_scale(gate: Tensor, row_scale: Tensor) -> None:
    fits = row_scale.shape == gate.shape[:-1] and row_scale.device == gate.device
    if not fits or not row_scale.is_floating_point():
        raise KernelInputError(
            f"swiglu takes a row_scale of shape {tuple(gate.shape[:-1])}, floating-point and on "
            f"{gate.device}, found {_like(row_scale)}"
        )


def _like(x: Tensor) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)} on {x.device}"
