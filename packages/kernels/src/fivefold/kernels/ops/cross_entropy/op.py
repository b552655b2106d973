"""``cross_entropy`` as registered ops: shapes for tracing, gradients, checks, the reduction.

Legend: N tokens, V classes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fivefold.kernels.errors import KernelInputError
from fivefold.kernels.op import define
from fivefold.kernels.operands import sum_dtype

BACKENDS = ("triton", "cpu", "reference")
REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True, slots=True)
class Options:
    """What a loss is made of; see ``cross_entropy``."""

    ignore_index: int
    reduction: str
    label_smoothing: float
    z_loss: float


@define("fivefold_kernels", backends=BACKENDS)
def cross_entropy_forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """``logits`` (N, V), ``target`` (N,) to the losses (N,) and log-sum-exps (N,).

    The log-sum-exp of a token that is ignored may be any number.
    """
    dtype = sum_dtype(logits.dtype)
    num_tokens = logits.shape[0]
    return logits.new_empty(num_tokens, dtype=dtype), logits.new_empty(num_tokens, dtype=dtype)


@define("fivefold_kernels", backends=BACKENDS)
def cross_entropy_backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    backend: str | None,
) -> Tensor:
    """The gradient of ``logits`` (N, V) for those of the losses (N,)."""
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, target, weight, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, target, weight, output[1])


def _backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    dlogits = cross_entropy_backward(dloss, *ctx.saved_tensors, *ctx.options)
    return dlogits, None, None, None, None, None, None


cross_entropy_forward.differentiate(_save, _backward)


def apply(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    backend: str | None,
) -> Tensor:
    """See ``cross_entropy``: check, make rows, run, reduce."""
    check_logits(input, target)
    check("cross_entropy", target, weight, input.shape[-1], options)
    target_n = target.reshape(-1)
    logits = input.reshape(target_n.shape[0], input.shape[-1])
    loss, _ = cross_entropy_forward(
        logits,
        target_n,
        weight,
        options.ignore_index,
        options.label_smoothing,
        options.z_loss,
        backend,
    )
    return reduce(loss, target_n, weight, options).reshape(
        target.shape if options.reduction == "none" else ()
    )


def reduce(loss: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> Tensor:
    """Losses (N,) to what the reduction makes of them."""
    if options.reduction == "none":
        return loss
    if options.reduction == "sum":
        return loss.sum()
    return loss.sum() / divisor(target, weight, options.ignore_index, loss.dtype)


def divisor(target: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """What "mean" divides by: how many targets (N,) count, or the sum of their classes' weights."""
    counts = target != ignore_index
    if weight is None:
        return counts.sum(dtype=dtype)
    # A target that is out of range has made the loss NaN: here it must not read past the weights.
    index = target.clamp(0, weight.shape[0] - 1)
    return torch.where(counts, weight[index], 0).sum(dtype=dtype)


def check_logits(input: Tensor, target: Tensor) -> None:
    """Raise ``KernelInputError`` unless these are logits and class indices."""
    if input.dim() > 2:
        raise KernelInputError(
            f"cross_entropy takes logits (N, V) or (V,), found {tuple(input.shape)}: flatten them "
            "to logits.flatten(0, -2), with the classes last, and target.flatten()"
        )
    if input.dim() == 0 or input.shape[-1] == 0:
        raise KernelInputError(
            f"cross_entropy takes logits of at least one class, found {tuple(input.shape)}"
        )
    if not input.is_floating_point():
        raise KernelInputError(f"cross_entropy takes floating-point logits, found {input.dtype}")
    if target.shape != input.shape[:-1]:
        raise KernelInputError(
            f"cross_entropy takes a target of shape {tuple(input.shape[:-1])} for logits of shape "
            f"{tuple(input.shape)}, found {tuple(target.shape)}"
        )


def check(
    name: str, target: Tensor, weight: Tensor | None, num_classes: int, options: Options
) -> None:
    """Raise ``KernelInputError`` unless targets, class weights and options are legal."""
    if target.dtype not in (torch.int64, torch.int32):
        raise KernelInputError(
            f"{name} takes class indices in int64 or int32, found a target in {target.dtype}; "
            "torch.nn.functional has a form for class probabilities"
        )
    if weight is not None:
        _check_weight(name, weight, num_classes)
    if options.reduction not in REDUCTIONS:
        raise KernelInputError(
            f"{name} was asked for the reduction {options.reduction!r}; there are "
            + ", ".join(REDUCTIONS)
        )
    if not 0 <= options.label_smoothing <= 1:
        raise KernelInputError(
            f"{name} takes a label_smoothing from 0 to 1, found {options.label_smoothing}"
        )
    if not 0 <= options.z_loss < float("inf"):
        raise KernelInputError(f"{name} takes a z_loss of at least 0, found {options.z_loss}")


def _check_weight(name: str, weight: Tensor, num_classes: int) -> None:
    if weight.shape != (num_classes,) or not weight.is_floating_point():
        raise KernelInputError(
            f"{name} takes a floating-point weight of shape {(num_classes,)}, one for each class, "
            f"found {weight.dtype} of shape {tuple(weight.shape)}"
        )
    if weight.requires_grad and torch.is_grad_enabled():
        raise KernelInputError(
            f"{name} gives the classes' weight no gradient and found one that requires it: pass "
            "weight.detach()"
        )
