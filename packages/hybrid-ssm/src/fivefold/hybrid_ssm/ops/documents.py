"""Documents packed into one sequence."""

import torch
from torch import Tensor


def count_documents(seq_ids: Tensor) -> Tensor:
    """Ids (B, S) of documents side by side as numbers from 0 that never come back, int32.

    >>> count_documents(torch.tensor([[7, 7, 3, 7]]))
    tensor([[0, 0, 1, 2]], dtype=torch.int32)
    """
    numbers = torch.zeros_like(seq_ids, dtype=torch.int32)
    if seq_ids.shape[1] > 1:
        changes = seq_ids[:, 1:] != seq_ids[:, :-1]
        numbers[:, 1:] = changes.cumsum(1, dtype=torch.int32)
    return numbers
