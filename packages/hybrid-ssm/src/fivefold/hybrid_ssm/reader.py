"""Reading prompts and new tokens for generation.

Legend: B sequences, S tokens of the prompt, V vocabulary.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fivefold.hybrid_ssm.cache import HybridCache
from fivefold.hybrid_ssm.errors import HybridInputError
from fivefold.hybrid_ssm.prompts import Prompts

if TYPE_CHECKING:
    from fivefold.hybrid_ssm.model import HybridForCausalLM


class Reader:
    """Reads tokens and gives the logits of the next one, with a cache or without.

    Prompts of unequal length are packed into one row where they are to be read at once, so that
    nothing is computed of padding.

    Args:
        model: a whole model.
        prompts: what is read first.
        max_new_tokens: how many tokens follow at most.
        use_cache: whether to remember states and keys.
        cache: of the prompts' first tokens; None makes one where it is used.
        chunk_size: tokens of the prompts that are read at once; None reads all.

    Raises:
        HybridInputError: the cache has too many tokens or too little room, or is not to be used.
    """

    def __init__(
        self,
        model: "HybridForCausalLM",
        prompts: Prompts,
        max_new_tokens: int,
        use_cache: bool,
        cache: HybridCache | None,
        chunk_size: int | None,
    ):
        self.model, self.prompts, self.chunk_size = model, prompts, chunk_size
        self.ids, self.mask = prompts.ids, prompts.mask
        length = prompts.ids.shape[1]
        if cache is None:
            cache = HybridCache(length + max_new_tokens) if use_cache else None
        elif not use_cache:
            raise HybridInputError("past_key_values came with use_cache=False; leave one of them")
        elif cache.length >= length:
            raise HybridInputError(
                f"past_key_values holds {cache.length} tokens and the prompts have {length}; at "
                "least one token must be new"
            )
        elif model.has_attention and cache.max_length < length + max_new_tokens:
            raise HybridInputError(
                f"past_key_values has room for {cache.max_length} tokens; prompts of {length} and "
                f"{max_new_tokens} new ones need {length + max_new_tokens}: "
                f"fork(max_length={length + max_new_tokens}) makes room"
            )
        self.cache = cache

    def prefill(self) -> Tensor:
        """Logits after the prompts (B, V)."""
        if self.cache is None:
            return self._all()
        if self._worth_packing():
            return self._packed()
        start, length = self.cache.length, self.ids.shape[1]
        size = length - start if self.chunk_size is None else self.chunk_size
        logits = None
        for first in range(start, length, size):
            part = slice(first, min(first + size, length))
            mask = None if self.mask is None else self.mask[:, part]
            # Only the last of these is used, so nobody asks for the logits of the others.
            logits = self.model(
                self.ids[:, part], self.cache, attention_mask=mask, logits_to_keep=1
            )
        if logits is None:
            raise HybridInputError("there are no tokens to read")
        return logits[:, -1]

    def step(self, next_b: Tensor) -> Tensor:
        """Logits after one more token of each sequence (B, V)."""
        if self.cache is not None:
            return self.model(next_b[:, None], self.cache)[:, -1]
        self.ids = torch.cat((self.ids, next_b[:, None]), dim=1)
        if self.mask is not None:
            self.mask = torch.cat((self.mask, self.mask.new_ones((len(next_b), 1))), dim=1)
        return self._all()

    def follow(self, rows: Tensor) -> None:
        """Go on from these of the sequences (any number of times each)."""
        self.ids, self.mask = self.ids[rows], None if self.mask is None else self.mask[rows]
        if self.cache is not None:
            self.cache = self.cache.fork(rows=rows)

    def _worth_packing(self) -> bool:
        """Whether there is padding, and prompts without it are few enough to be read at once."""
        if self.cache is None or self.cache.length or self.mask is None:
            return False
        # The cache is then as long as the longest prompt, which has to be all of a row.
        return bool(self.mask.all(dim=1).any()) and (
            self.chunk_size is None or int(self.mask.sum()) <= self.chunk_size
        )

    def _packed(self) -> Tensor:
        rows = torch.arange(len(self.ids), device=self.ids.device).unsqueeze(1)
        rows = rows.expand(self.ids.shape)[self.mask]
        ids = self.ids[self.mask].unsqueeze(0)
        logits = self.model(ids, self.cache, seq_ids=rows.unsqueeze(0), logits_to_keep=1)
        return logits[:, -1]

    def _all(self) -> Tensor:
        return self.model(self.ids, attention_mask=self.mask, logits_to_keep=1)[:, -1]
