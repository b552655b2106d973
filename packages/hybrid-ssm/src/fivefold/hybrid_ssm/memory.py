"""What one forward pass tells its layers beside the hidden states.

Legend: B sequences, S tokens of them here, T keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fivefold.hybrid_ssm.cache import HybridCache
from fivefold.hybrid_ssm.errors import HybridInputError
from fivefold.hybrid_ssm.packed import Packed
from fivefold.parallel_core.documents import Documents


@dataclass(frozen=True, slots=True)
class Context:
    """The frame of a forward pass.

    Attributes:
        cache: memory of the tokens before; None where these are all.
        start: how many those are.
        mask: (B, S), False at padding; None where there is none.
        key_mask: (B, T), the same of all keys.
        documents: packed in the rows; None where each row is one.
        packed: where they lie, if the cache is to hold each of them by itself.
    """

    cache: HybridCache | None = None
    start: int = 0
    mask: Tensor | None = None
    key_mask: Tensor | None = None
    documents: Documents | None = None
    packed: Packed | None = None

    @property
    def seq_ids(self) -> Tensor | None:
        """(B, S) integers that are equal within a document and differ between neighbours."""
        return None if self.documents is None else self.documents.starts

    def num_tokens(self, given: int) -> int:
        """Tokens by which a cache grows when rows of so many ``given`` ones are read."""
        return given if self.packed is None else self.packed.longest

    def last(self, x: Tensor, count: int) -> Tensor:
        """The last ``count`` tokens of each sequence."""
        return x[:, -count:] if self.packed is None else self.packed.last(x, count)


ALONE = Context()
"""Whole sequences, one a row, nothing before them."""


def make_context(
    shape: tuple[int, int],
    cache: HybridCache | None = None,
    mask: Tensor | None = None,
    starts: Tensor | None = None,
    has_attention: bool = True,
) -> Context:
    """Check what a call was given.

    Args:
        shape: (B, S) of the tokens.
        cache: see ``Context``.
        mask: of the new tokens, any dtype; not zero at tokens.
        starts: for each token the position of its document's first token, or another integer that
            changes between documents; see ``parallel_core.documents``.
        has_attention: whether the model has attention layers.

    Raises:
        HybridInputError: shapes that do not fit, no room in the cache, or documents together with
            padding or with a cache that has tokens.
    """
    if mask is not None and tuple(mask.shape) != shape:
        raise HybridInputError(
            f"attention_mask has shape {tuple(mask.shape)}; it must be that of the tokens, {shape}"
        )
    if starts is not None and (mask is not None or (cache is not None and cache.length)):
        raise HybridInputError(
            "several documents in a row came together with an attention_mask or a cache of "
            f"{cache.length if cache else 0} tokens; pack without a mask and into an empty cache, "
            "or give each document a row"
        )
    if cache is not None and starts is not None:
        packed = Packed.of(starts)
        cache.begin(packed.longest, packed.mask(starts.device), has_attention)
        return Context(cache, documents=Documents(starts), packed=packed)
    if mask is not None:
        mask = None if bool(mask.all()) else mask.to(torch.bool)
    start, key_mask = 0, mask
    if cache is not None:
        start = cache.length
        key_mask = cache.begin(shape[1], mask, has_attention)
    documents = None if starts is None else Documents(starts)
    return Context(cache, start, mask, key_mask, documents)
