"""What the backends of several ops do to tensors before they compute."""

import torch
from torch import Tensor


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and products of values of a dtype are made in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def widened(x: Tensor) -> Tensor:
    """``x`` in the dtype that sums are made in."""
    return x.to(sum_dtype(x.dtype))


def dense_rows(x: Tensor) -> Tensor:
    """Rows (R, N) whose values lie side by side, at any distance from row to row."""
    return x if x.stride(1) == 1 else x.contiguous()
