"""``fp8_linear`` on the float8 products of cuBLAS, which take rows by columns alone.

Sums are fast and a little coarser in the result, exact float32 in the gradients, as in torchao.

Legend: M rows of the input, K its width, N width of the result.
"""

from typing import Any

import torch
from torch import Tensor

from fivefold.kernels.backends import chosen_unasked
from fivefold.kernels.ops.fp8_quantize.op import fp8_quantize as quantize_op

_E4M3 = torch.float8_e4m3fn


def refuses(name: str, *inputs: Any) -> str | None:
    """What ``torch._scaled_mm`` does not take."""
    first = inputs[0]
    if first.device.type != "cuda":
        return f"torch._scaled_mm is for CUDA devices, these tensors are on {first.device.type}"
    capability = torch.cuda.get_device_capability(first.device)
    if capability < (8, 9):
        return f"float8 needs a GPU of compute capability 8.9 or more, this is {capability}"
    if first.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"torch._scaled_mm has no result in {first.dtype}"
    # The width of the input and of the result; of a gradient's product the number of rows too.
    sizes = (
        _sizes_of_forward(inputs) if name == "fp8_linear_forward" else _sizes_of_backward(inputs)
    )
    if any(size == 0 or size % 16 for size in sizes):
        return f"torch._scaled_mm takes multiples of 16, found {sizes}"
    return None


def fp8_linear_forward(
    x: Tensor,
    weight: Tensor,
    grad_dtype: torch.dtype,
    power_of_2: bool,
    keep_x: bool,
    keep_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The result (M, N), bytes of ``x`` (K, M) and scale, bytes of ``weight`` (K, N) and scale."""
    x_fp8, x_t, x_scale = _quantize(x, _E4M3, power_of_2, keep_x)
    weight_fp8, weight_t, weight_scale = _quantize(weight, _E4M3, power_of_2, keep_weight)
    y = _mm(x_fp8, weight_fp8, x_scale, weight_scale, x.dtype, fast=True)
    return y, x_t.view(torch.uint8), x_scale, weight_t.view(torch.uint8), weight_scale


def fp8_linear_backward(
    dy: Tensor,
    x_t: Tensor,
    x_scale: Tensor,
    weight_t: Tensor,
    weight_scale: Tensor,
    grad_dtype: torch.dtype,
    power_of_2: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` (M, K) and ``weight`` (N, K); (0,) where the other was not kept."""
    dy_fp8, dy_t, dy_scale = _quantize(dy, grad_dtype, power_of_2, x_t.dim() == 2)
    dx, dweight = dy.new_empty(0), dy.new_empty(0)
    if weight_t.dim() == 2:
        dx = _mm(dy_fp8, weight_t.view(_E4M3), dy_scale, weight_scale, dy.dtype, fast=False)
    if x_t.dim() == 2:
        dweight = _mm(dy_t, x_t.view(_E4M3), dy_scale, x_scale, dy.dtype, fast=False)
    return dx, dweight


def _mm(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, *, fast: bool
) -> Tensor:
    """``a @ b.T`` of float8 values, divided by both scales."""
    return torch._scaled_mm(
        a,
        b.t(),
        scale_a=scale_a.reciprocal(),
        scale_b=scale_b.reciprocal(),
        out_dtype=dtype,
        use_fast_accum=fast,
    )


def _quantize(
    x: Tensor, dtype: torch.dtype, power_of_2: bool, transposed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """By the best backend that quantises, whatever was asked for the products."""
    inputs = (x, dtype, power_of_2, transposed)
    best = next(
        backend
        for backend in quantize_op.backends
        if chosen_unasked(backend, x.device.type) and quantize_op.refusal(backend, inputs) is None
    )
    values: tuple[Tensor, Tensor, Tensor] = quantize_op.implementation(best)(*inputs)
    return values


def _sizes_of_forward(inputs: tuple[Any, ...]) -> tuple[int, ...]:
    x, weight = inputs[:2]
    # No more rows than there are is no reason to refuse, but none at all is.
    return (*weight.shape, 16 * min(x.shape[0], 1))


def _sizes_of_backward(inputs: tuple[Any, ...]) -> tuple[int, ...]:
    dy, x_t, _, weight_t = inputs[:4]
    inner = [each.shape[0] for each in (x_t, weight_t) if each.dim() == 2]
    return (*dy.shape, *inner)
