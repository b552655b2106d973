"""``relu2`` in Triton, one value after the other."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fivefold.kernels.launch import launch
from fivefold.kernels.triton_parts import accumulator

# 16 values a thread: two accesses of 16 bytes in bfloat16.
_BLOCK, _NUM_WARPS = 2048, 4


def relu2_forward(x: Tensor) -> Tensor:
    """``relu(x)²``, contiguous."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        _forward_kernel,
        (triton.cdiv(x.numel(), _BLOCK),),
        x.contiguous(),
        y,
        x.numel(),
        COMPUTE=accumulator(x.dtype),
        BLOCK=_BLOCK,
        num_warps=_NUM_WARPS,
    )
    return y


def relu2_backward(dy: Tensor, x: Tensor) -> Tensor:
    """``2 relu(x) dy``, contiguous."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        _backward_kernel,
        (triton.cdiv(x.numel(), _BLOCK),),
        dy.contiguous(),
        x.contiguous(),
        dx,
        x.numel(),
        COMPUTE=accumulator(x.dtype),
        BLOCK=_BLOCK,
        num_warps=_NUM_WARPS,
    )
    return dx


@triton.jit
def _forward_kernel(x_ptr, y_ptr, num_values, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_values
    x = tl.load(x_ptr + at, mask=inside, other=0).to(COMPUTE)
    relu = tl.maximum(x, 0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y_ptr + at, (relu * relu).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(dy_ptr, x_ptr, dx_ptr, num_values, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_values
    dy = tl.load(dy_ptr + at, mask=inside, other=0).to(COMPUTE)
    x = tl.load(x_ptr + at, mask=inside, other=0).to(COMPUTE)
    relu = tl.maximum(x, 0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(dx_ptr + at, (2 * relu * dy).to(dx_ptr.dtype.element_ty), mask=inside)
