"""``adamw_step`` and ``gradient_norm`` in Triton: one launch for all tensors, whatever their sizes.

Kernels find tensors through tables of addresses, see tables.py. A first, tiny launch counts the
steps and computes for each tensor what all its values share, in float64; the second gives each
program one piece of one tensor.

Legend: T tensors, C pieces.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fivefold.kernels.launch import launch
from fivefold.kernels.operands import sum_dtype
from fivefold.kernels.ops.adamw import tables
from fivefold.kernels.triton_parts import accumulator

# Values of a program, and how many of them it has in registers at once.
_PIECE = 8192
_BLOCK = 1024

# Rows of the table of addresses; the first has the parameters.
_GRAD = tl.constexpr(1)
_EXP_AVG = tl.constexpr(2)
_EXP_AVG_SQ = tl.constexpr(3)
_MASTER = tl.constexpr(4)
_AVERAGE = tl.constexpr(5)
_STEP = tl.constexpr(6)
_AVERAGE_COUNT = tl.constexpr(7)

# Rows of the table of what values of a tensor share; the first has the gradient's factor.
_KEEP_PARAM = tl.constexpr(1)
_NEW_FIRST = tl.constexpr(2)
_KEEP_SECOND = tl.constexpr(3)
_NEW_SECOND = tl.constexpr(4)
_SECOND_FACTOR = tl.constexpr(5)
_EPS = tl.constexpr(6)
_STEP_SIZE = tl.constexpr(7)
_KEEP_AVERAGE = tl.constexpr(8)
_NEW_AVERAGE = tl.constexpr(9)
_ACTIVE = tl.constexpr(10)
_SHARED_ROWS = 11

_TRITON_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    masters: list[Tensor],
    averages: list[Tensor],
    average_counts: list[Tensor],
    settings: Tensor,
    scale: Tensor | None,
    maximize: bool,
    swa: bool,
    skip_nonfinite: bool,
) -> None:
    """See the public function."""
    valued = [params, grads, exp_avgs, exp_avg_sqs, masters, averages]
    starts, numels = tables.addresses([*valued, steps, average_counts]), tables.sizes(params)
    num_tensors, device = len(params), params[0].device
    addresses, sizes = tables.table(starts, device), tables.table((numels,), device)
    compute = sum_dtype(params[0].dtype)
    shared = torch.empty((_SHARED_ROWS, num_tensors), dtype=compute, device=device)
    launch(
        _share_kernel,
        (num_tensors,),
        addresses,
        settings,
        scale,
        shared,
        num_tensors,
        HAS_SCALE=scale is not None,
        HAS_AVERAGE=bool(averages),
        MAXIMIZE=maximize,
        SWA=swa,
        SKIP_NONFINITE=skip_nonfinite,
        num_warps=1,
    )
    for aligned, pieces in tables.pieces(starts[: len(valued)], numels, _PIECE, device):
        launch(
            _update_kernel,
            (len(pieces),),
            pieces,
            addresses,
            sizes,
            shared,
            num_tensors,
            PARAM=_dtype(params),
            GRAD=_dtype(grads),
            MOMENT=_dtype(exp_avgs),
            HAS_MASTER=bool(masters),
            HAS_AVERAGE=bool(averages),
            COMPUTE=_TRITON_DTYPES[compute],
            ALIGNMENT=16 if aligned else 1,
            PIECE=_PIECE,
            BLOCK=_BLOCK,
        )


def gradient_norm(grads: list[Tensor]) -> Tensor:
    """See the public function."""
    starts, numels, device = tables.addresses([grads]), tables.sizes(grads), grads[0].device
    addresses, sizes = tables.table(starts, device), tables.table((numels,), device)
    kinds = tables.pieces(starts, numels, _PIECE, device)
    compute = sum_dtype(grads[0].dtype)
    num_pieces = sum(len(pieces) for _, pieces in kinds)
    partial = torch.empty(num_pieces, dtype=compute, device=device)
    done = 0
    for aligned, pieces in kinds:
        launch(
            _squares_kernel,
            (len(pieces),),
            pieces,
            addresses,
            sizes,
            partial[done:],
            GRAD=_dtype(grads),
            COMPUTE=accumulator(grads[0].dtype),
            ALIGNMENT=16 if aligned else 1,
            PIECE=_PIECE,
            BLOCK=_BLOCK,
        )
        done += len(pieces)
    return partial.sum().sqrt()


@triton.jit
def _share_kernel(
    addresses_ptr,
    settings_ptr,
    scale_ptr,
    shared_ptr,
    num_tensors,
    HAS_SCALE: tl.constexpr,
    HAS_AVERAGE: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    SWA: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
):
    tensor = tl.program_id(0)
    lr = tl.load(settings_ptr)
    beta1 = tl.load(settings_ptr + 1)
    beta2 = tl.load(settings_ptr + 2)
    eps = tl.load(settings_ptr + 3)
    weight_decay = tl.load(settings_ptr + 4)
    average_decay = tl.load(settings_ptr + 5)

    grad_factor = tl.full((), 1, tl.float64)
    active = tl.full((), 1, tl.float32)
    if HAS_SCALE:
        grad_factor = tl.load(scale_ptr).to(tl.float64)
        if SKIP_NONFINITE:
            active = (tl.abs(grad_factor) < float("inf")).to(tl.float32)
    if MAXIMIZE:
        grad_factor = -grad_factor

    step = _count(addresses_ptr + _STEP * num_tensors + tensor, active)
    first_bias = 1 - tl.exp(step * tl.log(beta1))
    second_bias = 1 - tl.exp(step * tl.log(beta2))

    at = shared_ptr + tensor
    _share(at, grad_factor)
    _share(at + _KEEP_PARAM * num_tensors, 1 - lr * weight_decay)
    _share(at + _NEW_FIRST * num_tensors, 1 - beta1)
    _share(at + _KEEP_SECOND * num_tensors, beta2)
    _share(at + _NEW_SECOND * num_tensors, 1 - beta2)
    _share(at + _SECOND_FACTOR * num_tensors, 1 / tl.sqrt(second_bias))
    _share(at + _EPS * num_tensors, eps)
    _share(at + _STEP_SIZE * num_tensors, lr / first_bias)
    _share(at + _ACTIVE * num_tensors, active)
    if HAS_AVERAGE:
        count = _count(addresses_ptr + _AVERAGE_COUNT * num_tensors + tensor, active)
        if SWA:
            keep = 1 - 1 / count
        else:
            keep = tl.where(count == 1, 0, average_decay)
        _share(at + _KEEP_AVERAGE * num_tensors, keep)
        _share(at + _NEW_AVERAGE * num_tensors, 1 - keep)


@triton.jit
def _count(address_at, one):
    """Count up the number whose address is there; gives it in float64, at least 1."""
    count_at = tl.load(address_at).to(tl.pointer_type(tl.float32))
    count = tl.load(count_at) + one
    tl.store(count_at, count)
    # A step that is skipped may be the first, and must not divide by zero.
    return tl.maximum(count, 1).to(tl.float64)


@triton.jit
def _share(at, value):
    tl.store(at, value.to(at.dtype.element_ty))


@triton.jit
def _update_kernel(
    pieces_ptr,
    addresses_ptr,
    sizes_ptr,
    shared_ptr,
    num_tensors,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    HAS_AVERAGE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    piece = pieces_ptr + 2 * tl.program_id(0)
    tensor, start = tl.load(piece), tl.multiple_of(tl.load(piece + 1), PIECE)
    row = addresses_ptr + tensor
    params = _values(row, PARAM, ALIGNMENT)
    grads = _values(row + _GRAD * num_tensors, GRAD, ALIGNMENT)
    firsts = _values(row + _EXP_AVG * num_tensors, MOMENT, ALIGNMENT)
    seconds = _values(row + _EXP_AVG_SQ * num_tensors, MOMENT, ALIGNMENT)
    masters = _values(row + _MASTER * num_tensors, COMPUTE, ALIGNMENT)
    averages = _values(row + _AVERAGE * num_tensors, COMPUTE, ALIGNMENT)
    shared = shared_ptr + tensor

    if tl.load(shared + _ACTIVE * num_tensors) == 1:
        stop = tl.minimum(start + PIECE, tl.load(sizes_ptr + tensor))
        # Blocks of values that are all there need no mask, which would break up wide accesses.
        whole = start + (stop - start) // BLOCK * BLOCK
        for block in range(start, whole, BLOCK):
            _update(
                params,
                grads,
                firsts,
                seconds,
                masters,
                averages,
                shared,
                num_tensors,
                block,
                stop,
                PARTIAL=False,
                HAS_MASTER=HAS_MASTER,
                HAS_AVERAGE=HAS_AVERAGE,
                COMPUTE=COMPUTE,
                BLOCK=BLOCK,
            )
        if whole != stop:
            _update(
                params,
                grads,
                firsts,
                seconds,
                masters,
                averages,
                shared,
                num_tensors,
                whole,
                stop,
                PARTIAL=True,
                HAS_MASTER=HAS_MASTER,
                HAS_AVERAGE=HAS_AVERAGE,
                COMPUTE=COMPUTE,
                BLOCK=BLOCK,
            )


@triton.jit
def _update(
    params,
    grads,
    firsts,
    seconds,
    masters,
    averages,
    shared,
    num_tensors,
    block,
    stop,
    PARTIAL: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    HAS_AVERAGE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = block + tl.arange(0, BLOCK)
    inside = at < stop if PARTIAL else None
    weights = masters if HAS_MASTER else params
    g = tl.load(grads + at, mask=inside).to(COMPUTE)
    m = tl.load(firsts + at, mask=inside).to(COMPUTE)
    v = tl.load(seconds + at, mask=inside).to(COMPUTE)
    w = tl.load(weights + at, mask=inside).to(COMPUTE)

    g *= tl.load(shared)
    m += (g - m) * tl.load(shared + _NEW_FIRST * num_tensors)
    v *= tl.load(shared + _KEEP_SECOND * num_tensors)
    v += g * g * tl.load(shared + _NEW_SECOND * num_tensors)
    root = tl.sqrt(v) * tl.load(shared + _SECOND_FACTOR * num_tensors)
    step = m / (root + tl.load(shared + _EPS * num_tensors))
    w *= tl.load(shared + _KEEP_PARAM * num_tensors)
    w -= step * tl.load(shared + _STEP_SIZE * num_tensors)

    rounded = w.to(params.dtype.element_ty)
    tl.store(params + at, rounded, mask=inside)
    tl.store(firsts + at, m.to(firsts.dtype.element_ty), mask=inside)
    tl.store(seconds + at, v.to(seconds.dtype.element_ty), mask=inside)
    if HAS_MASTER:
        tl.store(masters + at, w, mask=inside)
    else:
        w = rounded.to(COMPUTE)
    if HAS_AVERAGE:
        average = tl.load(averages + at, mask=inside)
        average *= tl.load(shared + _KEEP_AVERAGE * num_tensors)
        average += w * tl.load(shared + _NEW_AVERAGE * num_tensors)
        tl.store(averages + at, average, mask=inside)


@triton.jit
def _squares_kernel(
    pieces_ptr,
    addresses_ptr,
    sizes_ptr,
    partial_ptr,
    GRAD: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    piece = pieces_ptr + 2 * tl.program_id(0)
    tensor, start = tl.load(piece), tl.multiple_of(tl.load(piece + 1), PIECE)
    grads = _values(addresses_ptr + tensor, GRAD, ALIGNMENT)
    stop = tl.minimum(start + PIECE, tl.load(sizes_ptr + tensor))
    whole = start + (stop - start) // BLOCK * BLOCK
    offsets = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), COMPUTE)
    for block in range(start, whole, BLOCK):
        g = tl.load(grads + block + offsets).to(COMPUTE)
        squares += g * g
    if whole != stop:
        at = whole + offsets
        g = tl.load(grads + at, mask=at < stop, other=0).to(COMPUTE)
        squares += g * g
    tl.store(partial_ptr + tl.program_id(0), tl.sum(squares))


@triton.jit
def _values(address_at, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    address = tl.load(address_at).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(address, ALIGNMENT)


def _dtype(tensors: list[Tensor]) -> tl.dtype:
    return _TRITON_DTYPES[tensors[0].dtype]
