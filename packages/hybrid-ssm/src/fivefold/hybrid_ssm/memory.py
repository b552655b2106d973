"""What one forward pass tells its layers beside the hidden states.

Legend: B sequences, S tokens of them here, T keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fivefold.hybrid_ssm.cache import HybridCache
from fivefold.hybrid_ssm.errors import HybridInputError


@dataclass(frozen=True, slots=True)
class Context:
    """The frame of a forward pass.

    Attributes:
        cache: memory of the tokens before; None where these are all.
        start: how many those are.
        mask: (B, S), False at padding; None where there is none.
        key_mask: (B, T), the same of all keys.
        seq_ids: (B, S), which document a token is of; None where each row is one.
        stretches: rows that share their borders of documents, and those borders; () for none.
    """

    cache: HybridCache | None = None
    start: int = 0
    mask: Tensor | None = None
    key_mask: Tensor | None = None
    seq_ids: Tensor | None = None
    stretches: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()


ALONE = Context()
"""Whole sequences, one a row, nothing before them."""


def make_context(
    shape: tuple[int, int],
    cache: HybridCache | None,
    mask: Tensor | None,
    seq_ids: Tensor | None,
    has_attention: bool,
) -> Context:
    """Check what a call was given, and find the borders of documents once for all layers.

    Args:
        shape: (B, S) of the tokens.
        cache: see ``Context``.
        mask: of the new tokens, any dtype; not zero at tokens.
        seq_ids: integers.
        has_attention: whether the model has attention layers.

    Raises:
        HybridInputError: shapes that do not fit, or documents together with a cache or padding.
    """
    for name, value in (("attention_mask", mask), ("seq_ids", seq_ids)):
        if value is not None and tuple(value.shape) != shape:
            raise HybridInputError(
                f"{name} has shape {tuple(value.shape)}; it must be that of the tokens, {shape}"
            )
    if seq_ids is not None and (cache is not None or mask is not None):
        raise HybridInputError(
            "seq_ids (several documents in a row) came together with a cache or an attention_mask; "
            "pack without them, or give each document a row"
        )
    if mask is not None:
        mask = None if bool(mask.all()) else mask.to(torch.bool)
    key_mask = mask
    if cache is not None:
        key_mask = cache.begin(shape[1], mask, has_attention)
    stretches = () if seq_ids is None or not has_attention else find_stretches(seq_ids)
    start = 0 if cache is None else cache.length
    return Context(cache, start, mask, key_mask, seq_ids, stretches)


def find_stretches(seq_ids: Tensor) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """Rows of equal borders, and the borders: position 0, each change of id, and the length.

    >>> find_stretches(torch.tensor([[0, 0, 1], [4, 4, 7], [0, 0, 0]]))
    (((0, 1), (0, 2, 3)), ((2,), (0, 3)))
    """
    length = seq_ids.shape[1]
    found: dict[tuple[int, ...], list[int]] = {}
    for row, ids in enumerate(seq_ids.cpu()):
        inner = ((ids[1:] != ids[:-1]).nonzero().flatten() + 1).tolist()
        found.setdefault((0, *inner, length), []).append(row)
    return tuple((tuple(rows), borders) for borders, rows in found.items())
