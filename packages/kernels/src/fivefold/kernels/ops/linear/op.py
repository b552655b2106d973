"""``linear`` as a registered op: shapes for tracing, gradients, where it is worth taking.

Legend: M rows of the input, K its width, N width of the result.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fivefold.kernels.autocast import as_autocast
from fivefold.kernels.backends import asked_everywhere
from fivefold.kernels.errors import KernelInputError
from fivefold.kernels.op import define

BACKENDS = ("aten", "cpu", "reference")
FEWEST_ROWS = 8
"""Of fewer rows oneDNN has no use: reading the weights is all there is to do."""
MOST_ROWS = {torch.float32: 7, torch.bfloat16: 3}
"""Up to so many rows C++ reads the weights faster than torch, twice as fast for one row."""
FEWEST_WEIGHTS = 2**16
"""Of fewer weights the way to the op takes what it gains."""
FEWEST_PRODUCTS = 2**22
"""Of fewer multiplications, a twentieth of a millisecond, the way to the op takes what it gains."""


@define("fivefold_kernels", backends=BACKENDS)
def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None) -> Tensor:
    """``x`` (M, K), ``weight`` (N, K) and ``bias`` (N,) to the result (M, N)."""
    return x.new_empty(x.shape[0], weight.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.backend = inputs
    # What only the gradient of a frozen operand would need is not kept.
    wants_x, wants_weight, ctx.wants_bias = ctx.needs_input_grad[:3]
    ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dx = None if weight is None else linear_forward(dy, weight.t(), None, ctx.backend)
    dweight = None if x is None else linear_forward(dy.t(), x.t(), None, ctx.backend)
    return dx, dweight, dy.sum(0) if ctx.wants_bias else None, None


linear_forward.differentiate(_save, _backward, repeatedly=True)


def apply(input: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None) -> Tensor:
    """See ``linear``: follow autocast, take torch's own way or rows and the op."""
    x, weight, bias = as_autocast(input, weight, bias)
    if backend is None and asked_everywhere() is None and _is_reading(x, weight, bias):
        backend = "cpu"
    if backend is None and asked_everywhere() is None and not _worthwhile(x, weight):
        return F.linear(x, weight, bias)
    check(x, weight, bias)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    y = linear_forward(rows, weight, bias, backend)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def check(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ``KernelInputError`` unless input, weight and bias fit together."""
    fits = input.dim() >= 1 and weight.dim() == 2 and input.shape[-1] == weight.shape[1]
    if not fits or not input.is_floating_point() or input.dtype != weight.dtype:
        raise KernelInputError(
            "linear takes input (..., K) and weight (N, K) of one floating-point dtype; found "
            f"{tuple(input.shape)} {input.dtype} and {tuple(weight.shape)} {weight.dtype}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise KernelInputError(
            f"linear takes a bias ({weight.shape[0]},) in {weight.dtype}, found "
            f"{tuple(bias.shape)} {bias.dtype}"
        )


def _worthwhile(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype == torch.float32 == weight.dtype
        and x.device.type == "cpu"
        and x.dim() >= 2
        and weight.dim() == 2
        and x.numel() >= FEWEST_ROWS * x.shape[-1]
        and x.numel() * weight.shape[0] >= FEWEST_PRODUCTS
        and mkl_is_slow()
    )


def _is_reading(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether rows are so few that weights are read for nothing else; not where gradients are."""
    return (
        not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype in MOST_ROWS
        and x.dtype == weight.dtype
        and 0 < x.numel() <= MOST_ROWS[x.dtype] * x.shape[-1]
        and weight.dim() == 2
        and weight.stride(1) == 1
        and weight.numel() >= FEWEST_WEIGHTS
        and not torch.compiler.is_compiling()
        and mkl_is_slow()
        and linear_forward.refusal("cpu", (x, weight, bias)) is None
    )


@cache
def mkl_is_slow() -> bool:
    """Whether float32 products of this CPU are faster by oneDNN: AVX-512, and not Intel's."""
    if not torch.backends.mkldnn.is_available():
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and _vendor() == "AuthenticAMD"


def _vendor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            found = next((line for line in lines if line.startswith("vendor_id")), "")
    except OSError:
        return ""
    return found.rpartition(":")[2].strip()
