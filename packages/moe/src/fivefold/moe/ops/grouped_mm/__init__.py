"""Matrix products of groups of rows, each group with its own weight: the experts' hot path."""

from torch import Tensor

from fivefold.moe.errors import MoEInputError
from fivefold.moe.ops.grouped_mm import autograd

__all__ = ["grouped_mm"]


def grouped_mm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Multiply consecutive groups of rows by one weight each: ``x[group e] @ weight[e].T``.

    Runs torch's grouped kernel where that takes the dtype and strides, else one matmul per
    group; both give the same numbers. The weight always receives a gradient, also with no rows.

    Args:
        x: rows sorted by group, (T, K).
        weight: one matrix per group, (E, N, K).
        counts: rows in each group, integers (E,), summing to T.

    Returns:
        (T, N).

    Raises:
        MoEInputError: the shapes or dtypes do not fit together.

    >>> import torch
    >>> grouped_mm(torch.ones(3, 2), torch.ones(2, 4, 2), torch.tensor([1, 2])).shape
    torch.Size([3, 4])
    """
    fits = x.dim() == 2 and weight.dim() == 3 and x.shape[-1] == weight.shape[-1]
    if not fits or counts.shape != weight.shape[:1] or x.dtype != weight.dtype:
        raise MoEInputError(
            f"grouped_mm takes x (T, K), weight (E, N, K) of one dtype and counts (E,); found x "
            f"{tuple(x.shape)} {x.dtype}, weight {tuple(weight.shape)} {weight.dtype} and counts "
            f"{tuple(counts.shape)}"
        )
    result: Tensor = autograd.grouped_mm(x, weight, counts)
    return result
