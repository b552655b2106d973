"""``grouped_mm`` in float32 by oneDNN, group after group, for CPUs that MKL runs slowly.

Legend: T the ragged dim, E groups, K and M and N the others.
"""

import torch
from torch import Tensor

from fivefold.kernels.ops.grouped_mm.check import spans
from fivefold.kernels.ops.linear import aten
from fivefold.kernels.ops.linear.op import mkl_is_slow


def grouped_mm(mat_a: Tensor, mat_b: Tensor, offs: Tensor) -> Tensor:
    """``(T, N)``: the rows of group e times ``mat_b[e]``, then zeros."""
    groups = spans(offs, mat_a.shape[0])
    y = mat_a.new_empty(mat_a.shape[0], mat_b.shape[2])
    for group, (start, end) in enumerate(groups):
        if start < end:
            y[start:end] = aten.linear_forward(mat_a[start:end], mat_b[group].t(), None)
    y[groups[-1][1] :] = 0
    return y


def grouped_outer(mat_a: Tensor, mat_b: Tensor, offs: Tensor) -> Tensor:
    """``(E, M, N)``: the product over each group's part of T."""
    y = mat_a.new_empty(len(offs), mat_a.shape[0], mat_b.shape[1])
    for part, (start, end) in zip(y, spans(offs, mat_b.shape[0]), strict=True):
        if start < end:
            part.copy_(aten.linear_forward(mat_a[:, start:end], mat_b[start:end].t(), None))
        else:
            part.zero_()
    return y


def faster(x: Tensor) -> bool:
    """Whether it is for these values and this CPU."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and mkl_is_slow()
