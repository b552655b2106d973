"""``fp8_linear`` as registered ops: shapes for tracing, gradients, checks.

Legend: M rows of the input, K its width, N width of the result.
"""

from typing import Any

import torch
from torch import Tensor

from fivefold.kernels.derivatives import keep_sources, wants_gradient
from fivefold.kernels.errors import KernelInputError
from fivefold.kernels.op import define
from fivefold.kernels.ops.fp8_quantize.op import DTYPES

BACKENDS = ("aten", "triton", "reference")


@define("fivefold_kernels", backends=BACKENDS)
def fp8_linear_forward(
    x: Tensor,
    weight: Tensor,
    grad_dtype: torch.dtype,
    power_of_2: bool,
    keep_x: bool,
    keep_weight: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``x`` (M, K), ``weight`` (N, K) to the result (M, N) and what the gradients need.

    That is the float8 ``x`` (K, M) and ``weight`` (K, N) with their scales (), transposed as
    tensor cores take them; (0,) unless they are to be kept. They are bytes, of which no one can
    think that they have gradients.
    """
    (rows, inner), width = x.shape, weight.shape[0]
    return (
        x.new_empty(rows, width),
        x.new_empty((inner, rows) if keep_x else (0,), dtype=torch.uint8),
        x.new_empty((), dtype=torch.float32),
        x.new_empty((inner, width) if keep_weight else (0,), dtype=torch.uint8),
        x.new_empty((), dtype=torch.float32),
    )


@define("fivefold_kernels", backends=BACKENDS)
def fp8_linear_backward(
    dy: Tensor,
    x_t: Tensor,
    x_scale: Tensor,
    weight_t: Tensor,
    weight_scale: Tensor,
    grad_dtype: torch.dtype,
    power_of_2: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` (M, K) and ``weight`` (N, K); (0,) where the other was not kept."""
    rows, width = dy.shape
    return (
        dy.new_empty((rows, weight_t.shape[0]) if weight_t.dim() == 2 else (0,)),
        dy.new_empty((width, x_t.shape[0]) if x_t.dim() == 2 else (0,)),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.grad_dtype, ctx.power_of_2, ctx.backend = inputs[2], inputs[3], inputs[6]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    keep_sources(ctx, *inputs[:2])


def _backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    kept = ctx.saved_tensors
    options = (ctx.grad_dtype, ctx.power_of_2, ctx.backend)
    dx, dweight = fp8_linear_backward(dy, *kept, *options)
    of_x, of_weight = kept[2].dim() == 2, kept[0].dim() == 2
    return dx if of_x else None, dweight if of_weight else None, *([None] * 5)


fp8_linear_forward.differentiate(_save, _backward)


def apply(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad_dtype: torch.dtype,
    power_of_2: bool,
    backend: str | None,
) -> Tensor:
    """See ``fp8_linear``: check, make rows, run, restore the shape, add the bias."""
    check(input, weight, bias, grad_dtype)
    leading, inner = input.shape[:-1], input.shape[-1]
    y, *_ = fp8_linear_forward(
        input.reshape(leading.numel(), inner),
        weight,
        grad_dtype,
        power_of_2,
        wants_gradient(weight),
        wants_gradient(input),
        backend,
    )
    y = y.reshape(*leading, weight.shape[0])
    return y if bias is None else y + bias.to(y.dtype)


def check(input: Tensor, weight: Tensor, bias: Tensor | None, grad_dtype: torch.dtype) -> None:
    """Raise ``KernelInputError`` unless input, weight and bias fit together."""
    fits = input.dim() >= 1 and weight.dim() == 2 and input.shape[-1] == weight.shape[1]
    floating = input.is_floating_point() and input.dtype.itemsize > 1
    if not fits or not floating or input.dtype != weight.dtype:
        raise KernelInputError(
            "fp8_linear takes input (..., K) and weight (N, K) of one floating-point dtype that "
            f"is wider than float8; found {tuple(input.shape)} {input.dtype} and "
            f"{tuple(weight.shape)} {weight.dtype}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise KernelInputError(
            f"fp8_linear takes a bias ({weight.shape[0]},), found {tuple(bias.shape)}"
        )
    if grad_dtype not in DTYPES:
        raise KernelInputError(
            f"fp8_linear makes gradients in {' or '.join(map(str, DTYPES))}, was asked for "
            f"{grad_dtype}"
        )
