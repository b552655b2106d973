"""``rotary`` as a registered op: shapes for tracing, gradient, checks.

One op is both ways: the gradient of a rotation is the rotation by the negative angle.

Legend: B sequences, T tokens, H heads, D values in a head, P pairs of them that are rotated.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fivefold.kernels.errors import KernelInputError
from fivefold.kernels.op import define

BACKENDS = ("triton", "cpu", "reference")


@define("fivefold_kernels", backends=BACKENDS)
def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    heads_first: bool,
    inverse: bool,
    backend: str | None,
) -> Tensor:
    """``x`` (B, T, H, D), or (B, H, T, D) if ``heads_first``, rotated, and back if ``inverse``.

    ``cos`` and ``sin`` are (B, T, P), or (1, T, P) for all sequences.
    """
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, *ctx.options = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    interleaved, heads_first, inverse, backend = ctx.options
    dx = rotary(dy, *ctx.saved_tensors, interleaved, heads_first, not inverse, backend)
    return dx, None, None, None, None, None, None


rotary.differentiate(_save, _backward, repeatedly=True)


def apply(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    heads_first: bool,
    backend: str | None,
) -> Tensor:
    """See ``rotary``: check, make one dim of the leading ones, run, restore the shape."""
    check(x, cos, sin, heads_first)
    batch = math.prod(x.shape[:-3])
    y = rotary(
        x.reshape(batch, *x.shape[-3:]),
        cos.reshape(math.prod(cos.shape[:-2]), *cos.shape[-2:]),
        sin.reshape(math.prod(sin.shape[:-2]), *sin.shape[-2:]),
        interleaved,
        heads_first,
        False,
        backend,
    )
    return y.reshape(x.shape)


def check(x: Tensor, cos: Tensor, sin: Tensor, heads_first: bool) -> None:
    """Raise ``KernelInputError`` unless the inputs fit together."""
    layout = "(..., H, T, D)" if heads_first else "(..., T, H, D)"
    if not x.is_floating_point() or x.dim() < 3:
        raise KernelInputError(
            f"rotary takes floating-point values {layout}, found {x.dtype} of shape "
            f"{tuple(x.shape)}"
        )
    num_tokens, largest = x.shape[-2 if heads_first else -3], x.shape[-1] // 2
    legal = ((num_tokens,), (*x.shape[:-3], num_tokens))
    # Not `in`: torch.compile takes a number for no member where the members are symbols.
    fits = tuple(cos.shape[:-1]) == legal[0] or tuple(cos.shape[:-1]) == legal[1]
    if cos.dim() < 2 or not fits or cos.shape[-1] > largest:
        raise KernelInputError(
            f"rotary of x {tuple(x.shape)}, which is {layout}, takes cos of shape "
            f"{' or '.join(f'{dims} with R/2 up to {largest}' for dims in _shown(legal))}, found "
            f"{tuple(cos.shape)}"
        )
    if (sin.shape, sin.dtype) != (cos.shape, cos.dtype) or not cos.is_floating_point():
        raise KernelInputError(
            "rotary takes floating-point cos and sin of one shape and dtype, found "
            f"{cos.dtype} {tuple(cos.shape)} and {sin.dtype} {tuple(sin.shape)}"
        )
    if not x.device == cos.device == sin.device:
        raise KernelInputError(
            f"rotary takes x, cos and sin on one device, found {x.device}, {cos.device} and "
            f"{sin.device}"
        )
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise KernelInputError(
            "rotary has no gradient of cos and sin, and at least one of them requires it: "
            "detach() them"
        )


def _shown(legal: tuple[tuple[int, ...], ...]) -> list[str]:
    return list(dict.fromkeys(f"({', '.join(map(str, dims))}, R/2)" for dims in legal))
