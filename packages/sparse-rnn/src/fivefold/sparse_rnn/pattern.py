"""Where the nonzeros of a matrix are: found in dense weights, drawn at random, or given by a mask.

Legend: R rows, H columns, N nonzeros.
"""

import torch
from torch import Tensor

from fivefold.sparse_rnn.errors import SparseRNNInputError


def from_mask(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where rows begin (R + 1,) and the columns (N,), both int32, of what is true in (R, H)."""
    mask = mask != 0
    counts = mask.sum(1)
    crow = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
    crow[1:] = counts.cumsum(0)
    return crow, mask.nonzero()[:, 1].to(torch.int32).contiguous()


def to_mask(crow: Tensor, col: Tensor, num_cols: int) -> Tensor:
    """The mask (R, H) that ``from_mask`` was given."""
    mask = torch.zeros((crow.shape[0] - 1) * num_cols, dtype=torch.bool, device=col.device)
    mask[flat_index(crow, col, num_cols)] = True
    return mask.view(-1, num_cols)


def flat_index(crow: Tensor, col: Tensor, num_cols: int) -> Tensor:
    """The place (N,) of each nonzero in the dense matrix (R, H) laid out row by row."""
    rows = torch.arange(crow.shape[0] - 1, device=crow.device)
    row_n = rows.repeat_interleave(crow.diff().long(), output_size=col.shape[0])
    return row_n * num_cols + col.long()


def to_dense(values: Tensor, crow: Tensor, col: Tensor, num_cols: int) -> Tensor:
    """The matrix (R, H) with these nonzeros (N,)."""
    flat = values.new_zeros((crow.shape[0] - 1) * num_cols)
    return flat.index_copy(0, flat_index(crow, col, num_cols), values).view(-1, num_cols)


def random_mask(
    rows: int, cols: int, density: float, device: torch.device | str | None = None
) -> Tensor:
    """A mask (R, H) of exactly ``round(density * R * H)`` true values, evenly drawn."""
    check_density(density)
    keep = round(density * rows * cols)
    mask = torch.zeros(rows * cols, dtype=torch.bool, device=device)
    mask[torch.randperm(rows * cols, device=device)[:keep]] = True
    return mask.view(rows, cols)


def largest_mask(weight: Tensor, density: float) -> Tensor:
    """A mask (R, H) of the ``round(density * R * H)`` values of largest magnitude.

    Zeros are never among them, so there may be fewer.
    """
    check_density(density)
    keep = round(density * weight.numel())
    size = weight.detach().abs().flatten()
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[size.topk(keep).indices] = True
    return (mask & (size > 0)).view(weight.shape)


def check_density(density: float) -> None:
    """Raise ``SparseRNNInputError`` unless it is a share of values."""
    if not 0.0 <= density <= 1.0:
        raise SparseRNNInputError(
            f"density was asked to be {density}; it is the share of values that are kept, from 0 "
            "to 1"
        )
