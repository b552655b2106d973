"""Prompts of unequal length as one batch.

Legend: B sequences, S tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fivefold.hybrid_ssm.errors import HybridInputError


@dataclass(frozen=True, slots=True)
class Prompts:
    """A batch of prompts that end together.

    Attributes:
        ids: (B, S).
        mask: (B, S), False at padding; None where there is none.
    """

    ids: Tensor
    mask: Tensor | None

    def seen(self, vocab_size: int) -> Tensor:
        """Which tokens each prompt has, (B, V); padding is no token."""
        marks = torch.zeros((len(self.ids), vocab_size), dtype=torch.int32, device=self.ids.device)
        there = torch.ones_like(self.ids) if self.mask is None else self.mask
        return marks.scatter_add_(1, self.ids, there.to(torch.int32)) > 0


def pad_prompts(
    input_ids: Tensor | Sequence[Sequence[int]], mask: Tensor | None, pad: int | None
) -> Prompts:
    """Prompts as a batch; lists of unequal length are padded on the left.

    Raises:
        HybridInputError: an empty prompt or batch, a mask together with lists, of another shape,
            or with padding that is not on the left.
    """
    if not isinstance(input_ids, Tensor):
        if mask is not None:
            raise HybridInputError("attention_mask belongs to a tensor of ids; lists need none")
        return _from_lists(input_ids, 0 if pad is None else pad)
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise HybridInputError(
            f"input_ids has shape {tuple(input_ids.shape)}; it must be (at least 1 sequence, "
            "at least 1 token)"
        )
    if mask is None or bool((mask != 0).all()):
        return Prompts(input_ids, None)
    if mask.shape != input_ids.shape:
        raise HybridInputError(
            f"attention_mask has shape {tuple(mask.shape)} and input_ids {tuple(input_ids.shape)}; "
            "they must be equal"
        )
    mask = mask != 0
    if not bool((mask[:, 1:] >= mask[:, :-1]).all()) or not bool(mask[:, -1].all()):
        raise HybridInputError(
            "attention_mask has padding after a token; pad prompts on the left, so that all end "
            "together"
        )
    return Prompts(input_ids, mask)


def _from_lists(lists: Sequence[Sequence[int]], pad: int) -> Prompts:
    lengths = [len(ids) for ids in lists]
    if not lengths or min(lengths) < 1:
        raise HybridInputError(
            f"there are prompts of {lengths} tokens; at least one prompt, and each at least 1 token"
        )
    longest = max(lengths)
    rows = [[pad] * (longest - len(ids)) + list(ids) for ids in lists]
    mask = torch.tensor([[False] * (longest - n) + [True] * n for n in lengths])
    return Prompts(torch.tensor(rows), None if min(lengths) == longest else mask)


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Check that ids are of the vocabulary.

    Raises:
        HybridInputError: one is not.
    """
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise HybridInputError(
            f"input_ids are from {low} to {high}; the vocabulary has ids 0 to {vocab_size - 1}"
        )
