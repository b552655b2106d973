"""Outer products of channels, summed over sequences and projected, some residues at a time."""

from torch import Tensor

from fivefold.fold.ops.outer_product import op

__all__ = ["outer_product"]


def outer_product(
    a: Tensor,
    b: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    num_rows: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """``linear(flatten(sum_s a_si b_sj^T))`` of every pair (supplement, algorithm 10, lines 3, 4).

    The products themselves, C * D values for each pair, exist for some rows i at a time, forward
    and backward; backward makes them again.

    Args:
        a: (..., S, I, C).
        b: (..., S, J, D).
        weight: (Z, C * D).
        bias: (Z,).
        num_rows: how many i at a time; the default is what suits the device.
        backend: the default is the best there is.

    Returns:
        (..., I, J, Z).

    Raises:
        FoldInputError: the shapes or dtypes do not fit together.

    >>> import torch
    >>> outer_product(torch.ones(5, 2, 3), torch.ones(5, 4, 3), torch.ones(7, 9)).shape
    torch.Size([2, 4, 7])
    """
    return op.apply(a, b, weight, bias, num_rows, backend)
