"""``linear_cross_entropy`` as registered ops: shapes for tracing, gradients, checks.

Legend: N tokens, D features, V classes.
"""

from typing import Any

import torch
from torch import Tensor

from fivefold.kernels.autocast import as_autocast
from fivefold.kernels.derivatives import keep_sources, wants_gradient
from fivefold.kernels.errors import KernelInputError
from fivefold.kernels.op import define
from fivefold.kernels.operands import sum_dtype
from fivefold.kernels.ops.cross_entropy.op import Options, check, divisor

BACKENDS = ("triton", "cpu", "reference")


@define("fivefold_kernels", backends=BACKENDS)
def linear_cross_entropy_tokens(
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """``x`` (N, D), ``linear_weight`` (V, D), ``target`` (N,) to losses and log-sum-exps (N,)."""
    dtype = sum_dtype(x.dtype)
    return x.new_empty(x.shape[0], dtype=dtype), x.new_empty(x.shape[0], dtype=dtype)


@define("fivefold_kernels", backends=BACKENDS)
def linear_cross_entropy_backward(
    dloss: Tensor,
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    needed: list[bool],
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What gradients of the losses (N,) make of ``x``, ``linear_weight`` and ``linear_bias``.

    Those that are not ``needed`` are empty (0,). The last two are in the dtype of sums, at least
    float32.
    """
    return _empty_gradients(x, linear_weight, needed)


@define("fivefold_kernels", backends=BACKENDS)
def linear_cross_entropy_sum(
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    needed: list[bool],
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum of the losses, and its gradients as ``linear_cross_entropy_backward`` gives them."""
    total = x.new_empty((), dtype=sum_dtype(x.dtype))
    return total, *_empty_gradients(x, linear_weight, needed)


@define("fivefold_kernels", backends=BACKENDS)
def linear_cross_entropy_scale(
    gradients: list[Tensor], factor: Tensor, backend: str | None
) -> list[Tensor]:
    """Gradients times ``factor`` (), in the dtype of the first, rounded once."""
    return [torch.empty_like(each, dtype=gradients[0].dtype) for each in gradients]


def _save_tokens(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ignore_index, label_smoothing, z_loss, ctx.backend = inputs
    ctx.options = ignore_index, label_smoothing, z_loss
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _backward_tokens(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad[:3])
    saved = ctx.saved_tensors
    found = linear_cross_entropy_backward(dloss, *saved, *ctx.options, needed, ctx.backend)
    dtype = saved[0].dtype
    gradients = [each.to(dtype) if n else None for each, n in zip(found, needed, strict=True)]
    return *gradients, None, None, None, None, None, None


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needed, ctx.backend = inputs[-2:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    keep_sources(ctx, *inputs[:3])


def _backward_sum(ctx: Any, dtotal: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    scaled = linear_cross_entropy_scale(list(ctx.saved_tensors), dtotal, ctx.backend)
    gradients = [each if n else None for each, n in zip(scaled, ctx.needed, strict=True)]
    return *gradients, None, None, None, None, None, None, None


linear_cross_entropy_tokens.differentiate(_save_tokens, _backward_tokens)
linear_cross_entropy_sum.differentiate(_save_sum, _backward_sum)


def apply(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    backend: str | None,
) -> Tensor:
    """See ``linear_cross_entropy``: check, make rows, run, reduce."""
    check_linear(input, linear_weight, linear_bias, target)
    check("linear_cross_entropy", target, weight, linear_weight.shape[0], options)
    x, *linear = as_autocast(input, linear_weight, linear_bias)
    target_n = target.reshape(-1)
    arguments = (
        x.reshape(target_n.shape[0], x.shape[-1]),
        *linear,
        target_n,
        weight,
        options.ignore_index,
        options.label_smoothing,
        options.z_loss,
    )
    if options.reduction == "none":
        return linear_cross_entropy_tokens(*arguments, backend)[0].reshape(target.shape)
    needed = [wants_gradient(each) for each in (arguments[0], *linear)]
    if any(needed):
        total = linear_cross_entropy_sum(*arguments, needed, backend)[0]
    else:
        total = linear_cross_entropy_tokens(*arguments, backend)[0].sum()
    if options.reduction == "sum":
        return total
    return total / divisor(target_n, weight, options.ignore_index, total.dtype)


def check_linear(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor
) -> None:
    """Raise ``KernelInputError`` unless these are a linear layer, its input and class indices."""
    if linear_weight.dim() != 2 or linear_weight.shape[0] == 0:
        raise KernelInputError(
            "linear_cross_entropy takes a linear_weight (V, D) of at least one class, found "
            f"{tuple(linear_weight.shape)}"
        )
    num_classes, width = linear_weight.shape
    if input.dim() == 0 or input.shape[-1] != width:
        raise KernelInputError(
            f"linear_cross_entropy takes an input (..., {width}) for a linear_weight of shape "
            f"{(num_classes, width)}, found {tuple(input.shape)}"
        )
    if target.shape != input.shape[:-1]:
        raise KernelInputError(
            f"linear_cross_entropy takes a target of shape {tuple(input.shape[:-1])} for an input "
            f"of shape {tuple(input.shape)}, found {tuple(target.shape)}"
        )
    if linear_bias is not None and linear_bias.shape != (num_classes,):
        raise KernelInputError(
            f"linear_cross_entropy takes a linear_bias of shape {(num_classes,)}, found "
            f"{tuple(linear_bias.shape)}"
        )
    tensors = [each for each in (input, linear_weight, linear_bias) if each is not None]
    dtypes = {each.dtype for each in as_autocast(*tensors)}
    if len(dtypes) > 1 or not input.is_floating_point():
        raise KernelInputError(
            "linear_cross_entropy takes input, linear_weight and linear_bias of one floating-point "
            f"dtype, found {', '.join(str(each.dtype) for each in tensors)}"
        )


def _empty_gradients(
    x: Tensor, linear_weight: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    num_classes, width = linear_weight.shape
    return (
        x.new_empty(x.shape if needed[0] else 0),
        x.new_empty((num_classes, width) if needed[1] else 0, dtype=sum_dtype(x.dtype)),
        x.new_empty(num_classes if needed[2] else 0, dtype=sum_dtype(x.dtype)),
    )
