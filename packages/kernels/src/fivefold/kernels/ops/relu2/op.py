"""``relu2`` as registered ops: shapes for tracing, gradients, checks."""

from typing import Any

from torch import Tensor

from fivefold.kernels.errors import KernelInputError
from fivefold.kernels.op import define

BACKENDS = ("triton", "cpu", "reference")


@define("fivefold_kernels", backends=BACKENDS)
def relu2_forward(x: Tensor, backend: str | None) -> Tensor:
    """The result, like ``x``."""
    return x.new_empty(x.shape)


@define("fivefold_kernels", backends=BACKENDS)
def relu2_backward(dy: Tensor, x: Tensor, backend: str | None) -> Tensor:
    """The gradient of ``x``."""
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.backend = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    return relu2_backward(dy, x, ctx.backend), None


relu2_forward.differentiate(_save, _backward)


def apply(input: Tensor, backend: str | None) -> Tensor:
    """See ``relu2``: check and run."""
    if not input.is_floating_point():
        raise KernelInputError(f"relu2 takes floating-point values, found {input.dtype}")
    return relu2_forward(input, backend)
