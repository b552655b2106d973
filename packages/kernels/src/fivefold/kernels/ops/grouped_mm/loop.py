"""``grouped_mm`` on the CPU, group after group, of sizes that oneDNN has met before.

oneDNN compiles code for every size of a product: half a millisecond and half a megabyte each,
which is as long as the product of an expert's 256 rows takes. Routers give each expert another
number of rows every time, so rows are rounded up to few sizes: with the rows that follow, whose
results are overwritten by their own, or with zeros where rows are summed over.

Legend: T the ragged dim, E groups, K and M and N the others.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fivefold.kernels.ops.grouped_mm.check import spans
from fivefold.kernels.ops.linear import aten
from fivefold.kernels.ops.linear.op import FEWEST_ROWS, mkl_is_slow


def faster(x: Tensor) -> bool:
    """Whether products of these values are oneDNN's on this CPU."""
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if x.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return x.dtype == torch.float32 and mkl_is_slow()


def grouped_mm(mat_a: Tensor, mat_b: Tensor, offs: Tensor) -> Tensor:
    """``(T, N)``: the rows of group e times ``mat_b[e]``, then zeros."""
    size = mat_a.shape[0]
    y = mat_a.new_empty(size, mat_b.shape[2])
    groups = spans(offs, size)
    for group, (start, end) in enumerate(groups):
        if start == end:
            continue
        stop = start + few_sizes(end - start)
        if stop <= size:
            _product(mat_a[start:stop], mat_b[group], y[start:stop])
        else:
            # Nothing follows that could be taken instead of what stands before.
            _product(mat_a[start:end], mat_b[group], y[start:end])
    y[groups[-1][1] :] = 0
    return y


def grouped_outer(mat_a: Tensor, mat_b: Tensor, offs: Tensor) -> Tensor:
    """``(E, M, N)``: the product over each group's part of T."""
    y = mat_a.new_empty(len(offs), mat_a.shape[0], mat_b.shape[1])
    for part, (start, end) in zip(y, spans(offs, mat_b.shape[0]), strict=True):
        if start == end:
            part.zero_()
            continue
        a_mt, b_tn = mat_a[:, start:end], mat_b[start:end]
        more = few_sizes(end - start) - (end - start)
        if more:
            a_mt, b_tn = F.pad(a_mt.t(), (0, 0, 0, more)).t(), F.pad(b_tn, (0, 0, 0, more))
        _product(a_mt, b_tn, part)
    return y


def few_sizes(count: int) -> int:
    """``count`` rounded up to one of few sizes, by at most a sixteenth from 256 on."""
    if count < FEWEST_ROWS:
        return count
    step = 1 << max(4, count.bit_length() - 5)
    return -(-count // step) * step


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.dtype == torch.float32 and min(a.shape) >= FEWEST_ROWS:
        out.copy_(aten.linear_forward(a, b.t(), None))
    else:
        torch.mm(a, b, out=out)
