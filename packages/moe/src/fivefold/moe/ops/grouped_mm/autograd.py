"""``grouped_mm`` as registered torch ops: backend choice, shapes for tracing, gradients.

Legend: T rows, E groups, K input width, N output width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fivefold.moe.errors import MoEInputError
from fivefold.moe.ops.grouped_mm import reference

_GROUPED_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.bfloat16,),
}


@torch.library.custom_op("fivefold_moe::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """``(T, K)``, ``(E, N, K)``, ``(E,)`` to ``(T, N)``."""
    x = x.contiguous()
    _check_rows(x, counts)
    if x.shape[0] == 0 or weight.numel() == 0:
        return x.new_zeros(x.shape[0], weight.shape[1])
    if _grouped_runs(x, weight.mT):
        return F.grouped_mm(x, weight.mT, offs=_offsets(counts)).contiguous()
    return reference.grouped_mm(x, weight, counts)


@torch.library.custom_op("fivefold_moe::grouped_outer", mutates_args=())
def grouped_outer(y: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """``(T, N)``, ``(T, K)``, ``(E,)`` to ``(E, N, K)``: the weight gradient."""
    # An expanded gradient (from ``.sum().backward()``) has stride 0, which no kernel takes.
    y, x = y.contiguous(), x.contiguous()
    _check_rows(x, counts)
    if x.shape[0] == 0 or y.shape[1] == 0 or x.shape[1] == 0:
        return x.new_zeros(counts.shape[0], y.shape[1], x.shape[1])
    if _grouped_runs(y.mT, x):
        return F.grouped_mm(y.mT, x, offs=_offsets(counts)).contiguous()
    return reference.grouped_outer(y, x, counts)


@grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@grouped_outer.register_fake
def _(y: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(counts.shape[0], y.shape[1], x.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _mm_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, counts = ctx.saved_tensors
    dx = grouped_mm(dy, weight.mT, counts) if ctx.needs_input_grad[0] else None
    dweight = grouped_outer(dy, x, counts) if ctx.needs_input_grad[1] else None
    return dx, dweight, None


def _outer_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    y, x, counts = ctx.saved_tensors
    dy = grouped_mm(x, dout, counts) if ctx.needs_input_grad[0] else None
    dx = grouped_mm(y, dout.mT, counts) if ctx.needs_input_grad[1] else None
    return dy, dx, None


grouped_mm.register_autograd(_mm_backward, setup_context=_save)
grouped_outer.register_autograd(_outer_backward, setup_context=_save)


def _offsets(counts: Tensor) -> Tensor:
    return counts.cumsum(0).to(torch.int32)


def _grouped_runs(*operands: Tensor) -> bool:
    """Whether torch's kernel takes these operands: dtype, and strides of 16 bytes."""
    dtypes = _GROUPED_DTYPES.get(operands[0].device.type, ())
    return operands[0].dtype in dtypes and all(map(_aligned, operands))


def _aligned(matrix: Tensor) -> bool:
    strides = sorted(matrix.stride())
    return strides[0] == 1 and all(s * matrix.element_size() % 16 == 0 for s in strides[1:])


def _check_rows(x: Tensor, counts: Tensor) -> None:
    # Only where it costs nothing: on an accelerator the comparison would wait for the device.
    if counts.device.type == "cpu" and int(counts.sum()) != x.shape[0]:
        raise MoEInputError(
            f"grouped_mm got {x.shape[0]} rows but counts that sum to {int(counts.sum())}"
        )
