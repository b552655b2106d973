"""Rows of a tensor at two strides: enough for most that were transposed, without a copy.

Legend: O outer, I inner, N values in a row; rows are (O, I).
"""

import math
from itertools import pairwise

from torch import Tensor


def as_rows(x: Tensor, num_dims: int) -> Tensor:
    """A tensor as (O, I, N), where N spans its last ``num_dims`` dims; a view if that can be.

    All leading dims are inner dims where their rows follow each other at one stride.
    """
    lead = x.dim() - num_dims
    width = math.prod(x.shape[lead:])
    if not _one_stride(x, lead, x.dim()) or x.stride(-1) != 1:
        x = x.contiguous()
    for split in range(lead):
        if _one_stride(x, 0, split) and _one_stride(x, split, lead):
            break
    else:
        x, split = x.contiguous(), 0
    return x.reshape(math.prod(x.shape[:split]), math.prod(x.shape[split:lead]), width)


def side_by_side(x_oin: Tensor) -> Tensor:
    """Rows whose values lie side by side, at any distances from row to row."""
    return x_oin if x_oin.stride(2) == 1 else x_oin.contiguous()


def _one_stride(x: Tensor, first: int, last: int) -> bool:
    """Whether the dims from ``first`` to ``last - 1`` are one dim, cut up."""
    dims = [(x.shape[i], x.stride(i)) for i in range(first, last) if x.shape[i] != 1]
    return all(stride == size * step for (_, stride), (size, step) in pairwise(dims))
