"""``layer_norm`` as registered ops: shapes for tracing, gradients, checks.

Legend: O outer, I inner, N values in a row; rows are (O, I), see rows.py.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fivefold.kernels.errors import KernelInputError
from fivefold.kernels.op import define
from fivefold.kernels.operands import sum_dtype
from fivefold.kernels.ops.layer_norm.rows import as_rows

BACKENDS = ("triton", "cpu", "aten", "reference")


@define("fivefold_kernels", backends=BACKENDS)
def layer_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``x`` (O, I, N), ``weight`` and ``bias`` (N,) to ``y`` like x, mean and 1/std (O, I)."""
    wide = sum_dtype(x.dtype)
    mean = x.new_empty(x.shape[:2], dtype=wide)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, mean, torch.empty_like(mean)


@define("fivefold_kernels", backends=BACKENDS)
def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x`` (O, I, N), ``weight`` and ``bias`` (N,), empty (0,) where absent."""
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(0) if weight is None else weight.new_empty(weight.shape),
        x.new_empty(0) if bias is None else bias.new_empty(bias.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, weight, bias, *output[1:])


def _backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, mean, rstd = ctx.saved_tensors
    dx, dweight, dbias = layer_norm_backward(dy, x, weight, bias, mean, rstd, ctx.backend)
    dweight, dbias = None if weight is None else dweight, None if bias is None else dbias
    return dx, dweight, dbias, None, None


layer_norm_forward.differentiate(_save, _backward)


def apply(
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    backend: str | None,
) -> Tensor:
    """See ``layer_norm``: check, make rows, run, restore the shape."""
    check(input, normalized_shape, weight, bias)
    width = math.prod(normalized_shape)
    y, _, _ = layer_norm_forward(
        as_rows(input, len(normalized_shape)),
        None if weight is None else weight.reshape(width),
        None if bias is None else bias.reshape(width),
        eps,
        backend,
    )
    return y.reshape(input.shape)


def check(
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Raise ``KernelInputError`` unless the shapes fit together."""
    if not input.is_floating_point():
        raise KernelInputError(f"layer_norm takes floating-point values, found {input.dtype}")
    if not normalized_shape or input.shape[-len(normalized_shape) :] != normalized_shape:
        raise KernelInputError(
            f"layer_norm normalises the last dims {normalized_shape}, found input of shape "
            f"{tuple(input.shape)}"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != normalized_shape:
            raise KernelInputError(
                f"layer_norm takes a {name} of shape {normalized_shape}, found "
                f"{tuple(parameter.shape)}"
            )
