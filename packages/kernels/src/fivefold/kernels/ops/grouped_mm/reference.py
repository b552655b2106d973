"""The specification of ``grouped_mm`` in plain PyTorch: one product for each group.

Legend: T the ragged dim, E groups, K and M and N the others.
"""

import torch
from torch import Tensor

from fivefold.kernels.ops.grouped_mm.check import spans


def grouped_mm(mat_a: Tensor, mat_b: Tensor, offs: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``(T, N)``: the rows of group e times ``mat_b[e]``, then zeros."""
    groups = spans(offs, mat_a.shape[0])
    parts = [
        _mm(mat_a[start:end], mat_b[group], out_dtype) for group, (start, end) in enumerate(groups)
    ]
    num_left = mat_a.shape[0] - groups[-1][1]
    parts.append(mat_a.new_zeros(num_left, mat_b.shape[2], dtype=out_dtype))
    return torch.cat(parts)


def grouped_outer(mat_a: Tensor, mat_b: Tensor, offs: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``(E, M, N)``: the product over each group's part of T."""
    groups = spans(offs, mat_b.shape[0])
    return torch.stack(
        [_mm(mat_a[:, start:end], mat_b[start:end], out_dtype) for start, end in groups]
    )


def grouped_mm_scaled(
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    """``grouped_mm`` of the operands divided by their scales."""
    wide = torch.promote_types(scale_a.dtype, out_dtype)
    a_tk = mat_a.to(wide) / scale_a.to(wide)[:, None]
    b_ekn = mat_b.to(wide) / scale_b.to(wide)[:, None, None]
    return grouped_mm(a_tk, b_ekn, offs, out_dtype)


def _mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """One product, summed in at least float32 as every matrix product of torch is."""
    wide = torch.promote_types(a.dtype, out_dtype)
    return torch.mm(a.to(wide), b.to(wide)).to(out_dtype)
