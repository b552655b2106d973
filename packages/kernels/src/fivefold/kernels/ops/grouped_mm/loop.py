"""``grouped_mm`` on the CPU, group after group, of sizes that oneDNN has met before.

oneDNN compiles code for every size of a product: half a millisecond and half a megabyte each,
which is as long as the product of an expert's 256 rows takes. Routers give each expert another
number of rows every time, so rows are taken 256 at a time and the rest rounded up to few sizes:
with the rows that follow, whose results are overwritten by their own. Where rows are summed over,
all are, and zeros are added.

Legend: T the ragged dim, E groups, K and M and N the others.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fivefold.kernels.ops.grouped_mm.check import spans
from fivefold.kernels.ops.linear import aten
from fivefold.kernels.ops.linear.op import FEWEST_ROWS, mkl_is_slow

MOST_ROWS = 256
"""In one product: as fast as more of them."""


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
    for b_kn, (start, end) in zip(mat_b, groups, strict=True):
        for first in range(start, end, MOST_ROWS):
            last = min(first + MOST_ROWS, end)
            count = few_sizes(last - first)
            if first + count <= size:
                _product(mat_a[first : first + count], b_kn, y[first : first + count])
            else:
                # Nothing follows: what stands before is taken, whose results are there already.
                before = max(last - count, 0)
                y[first:last] = _product(mat_a[before:last], b_kn)[first - before :]
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
        more = few_sums(end - start) - (end - start)
        if more:
            a_mt, b_tn = F.pad(a_mt.t(), (0, 0, 0, more)).t(), F.pad(b_tn, (0, 0, 0, more))
        _product(a_mt, b_tn, part)
    return y


def few_sizes(count: int) -> int:
    """Up to ``MOST_ROWS`` rows, rounded up to one of ten sizes and what oneDNN does not do."""
    if count < FEWEST_ROWS:
        return count
    step = 16 if count <= 64 else 32
    return -(-count // step) * step


def few_sums(count: int) -> int:
    """Rows to sum over, rounded up by at most an eighth from 128 on."""
    if count < FEWEST_ROWS:
        return count
    step = 1 << max(4, count.bit_length() - 4)
    return -(-count // step) * step


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    if a.dtype != torch.float32 or min(a.shape) < FEWEST_ROWS:
        return torch.mm(a, b, out=out)
    y = aten.linear_forward(a, b.t(), None)
    return y if out is None else out.copy_(y)
