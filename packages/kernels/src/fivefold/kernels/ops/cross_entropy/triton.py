"""``cross_entropy`` in Triton: a program walks over a row once, for the log-sum-exp.

Each thread keeps a maximum and a sum of its own and rescales the sum once for the values of a
16-byte load, so that there is little more than one exponential a value and no reduction across
threads before the row ends. The gradient is made tile by tile from the log-sum-exp.

Legend: N tokens, V classes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fivefold.kernels.launch import launch
from fivefold.kernels.operands import dense_rows, sum_dtype
from fivefold.kernels.sizes import next_power_of_2
from fivefold.kernels.triton_parts import accumulator

# 16-byte loads that a thread has under way, and threads of a program.
_LOADS_FORWARD, _LOADS_BACKWARD = 2, 2
_WARPS_FORWARD, _WARPS_BACKWARD = 8, 4


def cross_entropy_forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor]:
    """The losses (N,) and log-sum-exps (N,)."""
    logits = dense_rows(logits)
    num_tokens, num_classes = logits.shape
    dtype = sum_dtype(logits.dtype)
    loss = torch.empty(num_tokens, dtype=dtype, device=logits.device)
    lse = torch.empty(num_tokens, dtype=dtype, device=logits.device)
    vector = 16 // logits.element_size()
    vectors = next_power_of_2(triton.cdiv(num_classes, vector))
    launch(
        _forward_kernel,
        (num_tokens,),
        logits,
        target.contiguous(),
        _contiguous(weight),
        _total(weight, label_smoothing, dtype),
        loss,
        lse,
        num_classes,
        logits.stride(0),
        ignore_index,
        SMOOTHING=label_smoothing,
        Z_LOSS=z_loss,
        COMPUTE=accumulator(logits.dtype),
        VECTORS=min(vectors, 32 * _WARPS_FORWARD * _LOADS_FORWARD),
        VECTOR=vector,
        num_warps=_WARPS_FORWARD,
    )
    return loss, lse


def cross_entropy_backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """The gradient of ``logits`` (N, V)."""
    logits = dense_rows(logits)
    num_tokens, num_classes = logits.shape
    dlogits = torch.empty((num_tokens, num_classes), dtype=logits.dtype, device=logits.device)
    tile = 32 * _WARPS_BACKWARD * _LOADS_BACKWARD * (16 // logits.element_size())
    tile = min(next_power_of_2(num_classes), tile)
    launch(
        _backward_kernel,
        (num_tokens, triton.cdiv(num_classes, tile)),
        dloss,
        logits,
        target.contiguous(),
        _contiguous(weight),
        _total(weight, label_smoothing, lse.dtype),
        lse,
        dlogits,
        num_classes,
        dloss.stride(0),
        logits.stride(0),
        ignore_index,
        SMOOTHING=label_smoothing,
        Z_LOSS=z_loss,
        COMPUTE=accumulator(logits.dtype),
        TILE=tile,
        num_warps=_WARPS_BACKWARD,
    )
    return dlogits


@triton.jit
def _forward_kernel(
    logits_ptr,
    target_ptr,
    weight_ptr,
    total_ptr,
    loss_ptr,
    lse_ptr,
    num_classes,
    row_stride,
    ignore_index,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    COMPUTE: tl.constexpr,
    VECTORS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr = logits_ptr + row * row_stride
    y = tl.load(target_ptr + row)
    counts = y != ignore_index
    legal = (y >= 0) & (y < num_classes)
    # No error without waiting for the device: a class that is not there shows as NaN, in the loss
    # and through the stored log-sum-exp in the gradient.
    picked = tl.load(x_ptr + y, mask=legal, other=float("nan")).to(COMPUTE)
    # A shift that keeps the sum of logits small beside what it is subtracted from.
    shift = tl.where(picked > -float("inf"), picked, 0)

    highest = tl.full((VECTORS,), -float("inf"), COMPUTE)
    exps = tl.zeros((VECTORS,), COMPUTE)
    sums = tl.zeros((VECTORS, VECTOR), COMPUTE)
    within = tl.arange(0, VECTORS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    # A token that is ignored is not read.
    for start in range(0, tl.where(counts, num_classes, 0), VECTORS * VECTOR):
        cols = start + within
        inside = cols < num_classes
        x = tl.load(x_ptr + cols, mask=inside, other=-float("inf")).to(COMPUTE)
        new = tl.maximum(highest, tl.max(x, axis=1))
        # Where there is nothing but -inf yet, exp(-inf) and not exp(-inf + inf).
        base = tl.where(new == -float("inf"), 0, new)
        exps = exps * tl.exp(highest - base) + tl.sum(tl.exp(x - base[:, None]), axis=1)
        highest = new
        if SMOOTHING != 0:
            shifted = tl.where(inside, x - shift, 0)
            if weight_ptr is not None:
                shifted *= tl.load(weight_ptr + cols, mask=inside, other=0).to(COMPUTE)
            sums += shifted

    top = tl.max(highest, axis=0)
    lse = top + tl.log(tl.sum(exps * tl.exp(highest - top), axis=0))
    tl.store(lse_ptr + row, tl.where(legal, lse, float("nan")))
    loss = lse - picked
    if weight_ptr is not None:
        loss *= tl.load(weight_ptr + y, mask=legal, other=0).to(COMPUTE)
    if SMOOTHING != 0:
        share = SMOOTHING / tl.full((), num_classes, COMPUTE)
        total = tl.full((), num_classes, COMPUTE)
        if weight_ptr is not None:
            total = tl.load(total_ptr)
        spread = total * (lse - shift) - tl.sum(tl.sum(sums, axis=1), axis=0)
        loss = loss * (1 - SMOOTHING) + spread * share
    if Z_LOSS != 0:
        loss += Z_LOSS * lse * lse
    tl.store(loss_ptr + row, tl.where(counts, loss, 0))


@triton.jit
def _backward_kernel(
    dloss_ptr,
    logits_ptr,
    target_ptr,
    weight_ptr,
    total_ptr,
    lse_ptr,
    dlogits_ptr,
    num_classes,
    dloss_stride,
    row_stride,
    ignore_index,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    COMPUTE: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(target_ptr + row)
    counts = y != ignore_index
    legal = (y >= 0) & (y < num_classes)
    dloss = tl.load(dloss_ptr + row * dloss_stride).to(COMPUTE)
    lse = tl.load(lse_ptr + row)

    cols = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = cols < num_classes
    # A token that is ignored is not read.
    read = cols < tl.where(counts, num_classes, 0)
    x = tl.load(logits_ptr + row * row_stride + cols, mask=read, other=0).to(COMPUTE)
    hit = tl.full((), 1 - SMOOTHING, COMPUTE)
    if weight_ptr is not None:
        hit *= tl.load(weight_ptr + y, mask=legal, other=0).to(COMPUTE)
    slope = hit
    if SMOOTHING != 0:
        share = SMOOTHING / tl.full((), num_classes, COMPUTE)
        if weight_ptr is not None:
            slope += share * tl.load(total_ptr)
        else:
            slope += SMOOTHING
    if Z_LOSS != 0:
        slope += 2 * Z_LOSS * lse
    dx = tl.exp(x - lse) * slope - tl.where(cols == y, hit, 0)
    if SMOOTHING != 0:
        if weight_ptr is not None:
            dx -= share * tl.load(weight_ptr + cols, mask=inside, other=0).to(COMPUTE)
        else:
            dx -= share
    dx = tl.where(counts, dx * dloss, 0)
    out = dlogits_ptr + row * num_classes + cols
    tl.store(out, dx.to(dlogits_ptr.dtype.element_ty), mask=inside)


def _contiguous(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


def _total(weight: Tensor | None, label_smoothing: float, dtype: torch.dtype) -> Tensor | None:
    """The sum of the classes' weights, which smoothing alone needs."""
    if weight is None or label_smoothing == 0:
        return None
    return weight.sum(dtype=dtype)
