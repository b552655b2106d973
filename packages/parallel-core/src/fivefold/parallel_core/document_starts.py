"""Where each token's document starts, made of ids, of end-of-text tokens or of lengths.

Legend: B sequences, S tokens of the whole sequence.
"""

from itertools import pairwise

import torch
from torch import Tensor

from fivefold.parallel_core.errors import ConfigError


def starts_of_ids(ids_bs: Tensor) -> Tensor:
    """The start of each token's document, from an id for each token.

    Args:
        ids_bs: (B, S); a document starts where the id changes.

    Returns:
        int64 (B, S).

    >>> starts_of_ids(torch.tensor([[7, 7, 7, 2, 5, 5]])).tolist()
    [[0, 0, 0, 3, 4, 4]]
    """
    first_bs = torch.ones_like(ids_bs, dtype=torch.bool)
    first_bs[:, 1:] = ids_bs[:, 1:] != ids_bs[:, :-1]
    return _last_start(first_bs)


def starts_after(ids_bs: Tensor, end_id: int) -> Tensor:
    """The start of each token's document, where every document ends with the token ``end_id``.

    >>> starts_after(torch.tensor([[4, 0, 0, 8, 8, 0]]), 0).tolist()
    [[0, 0, 2, 3, 3, 3]]
    """
    first_bs = torch.ones_like(ids_bs, dtype=torch.bool)
    first_bs[:, 1:] = ids_bs[:, :-1] == end_id
    return _last_start(first_bs)


def starts_of_lengths(cu_seqlens: Tensor, length: int) -> Tensor:
    """The start of each token's document, from where the documents of one sequence begin.

    Args:
        cu_seqlens: 0, then the sums of the first one, two, ... documents' lengths, up to
            ``length``: what attention over packed sequences commonly takes.
        length: S.

    Returns:
        int64 (1, S).

    Raises:
        ConfigError: these are no such sums.

    >>> starts_of_lengths(torch.tensor([0, 3, 4, 6]), 6).tolist()
    [[0, 0, 0, 3, 4, 4]]
    """
    bounds = [int(bound) for bound in cu_seqlens]
    rising = all(a <= b for a, b in pairwise(bounds))
    if not bounds or bounds[0] != 0 or bounds[-1] != length or not rising:
        raise ConfigError(
            f"cu_seqlens={bounds} for a sequence of {length} tokens; it rises from 0 to {length}"
        )
    lengths = cu_seqlens.diff().long()
    return cu_seqlens[:-1].long().repeat_interleave(lengths).unsqueeze(0)


def _last_start(first_bs: Tensor) -> Tensor:
    positions_s = torch.arange(first_bs.shape[1], device=first_bs.device)
    return (positions_s * first_bs).cummax(1).values
