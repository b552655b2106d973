"""Prompts that begin alike: their common beginning is read once.

A state stands for all tokens up to a point and cannot be cut shorter, so what is kept are copies
of whole caches at chosen points, such as the end of a system prompt.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fivefold.hybrid_ssm.cache import HybridCache
from fivefold.hybrid_ssm.errors import HybridInputError

if TYPE_CHECKING:
    from fivefold.hybrid_ssm.model import HybridForCausalLM


class PrefixStore:
    """Caches of beginnings of texts, the least recently used of which go first.

    Args:
        max_bytes: memory that they may take together.

    Example:
        >>> store = PrefixStore(max_bytes=1 << 30)                         # doctest: +SKIP
        >>> store.read(model, system_prompt)                               # doctest: +SKIP
        >>> cache = store.cache_for(prompt, max_length=len(prompt) + 100)  # doctest: +SKIP
        >>> model.generate([prompt], 100, past_key_values=cache)           # doctest: +SKIP
    """

    def __init__(self, max_bytes: int):
        if max_bytes < 1:
            raise HybridInputError(f"max_bytes is {max_bytes}; it must be at least 1")
        self.max_bytes = max_bytes
        self._caches: OrderedDict[tuple[int, ...], HybridCache] = OrderedDict()

    def __len__(self) -> int:
        """Beginnings that are kept."""
        return len(self._caches)

    @property
    def num_bytes(self) -> int:
        """Memory that they take."""
        return sum(map(_size, self._caches.values()))

    @torch.no_grad()
    def read(self, model: "HybridForCausalLM", ids: Sequence[int], chunk_size: int = 2048) -> None:
        """Let a model read a beginning, from the longest one that is kept on, and keep the cache.

        Args:
            model: in eval mode, the same one for all that a store keeps.
            ids: of the beginning, at least one.
            chunk_size: tokens that are read at once.
        """
        if not ids:
            raise HybridInputError("a beginning of no tokens cannot be kept; give at least 1 id")
        cache = self.cache_for([*ids, 0], len(ids)) or HybridCache(len(ids))
        device = next(model.parameters()).device
        for first in range(cache.length, len(ids), chunk_size):
            part = torch.tensor([ids[first : first + chunk_size]], device=device)
            model(part, cache, logits_to_keep=1)
        self.keep(ids, cache)

    def keep(self, ids: Sequence[int], cache: HybridCache) -> None:
        """Keep a copy of a cache of one sequence that has read ``ids``.

        Raises:
            HybridInputError: the cache is of another number of tokens.
        """
        if cache.length != len(ids):
            raise HybridInputError(
                f"the cache has read {cache.length} tokens, and {len(ids)} ids came with it"
            )
        self._caches[tuple(ids)] = cache.fork(max_length=len(ids))
        self._caches.move_to_end(tuple(ids))
        while self.num_bytes > self.max_bytes and self._caches:
            self._caches.popitem(last=False)

    def cache_for(self, ids: Sequence[int], max_length: int) -> HybridCache | None:
        """A cache of the longest beginning of ``ids`` that is kept, to go on with; None for none.

        Args:
            ids: of the prompt; at least its last token is left to read.
            max_length: room in the cache.
        """
        ids = tuple(ids)
        fitting = [key for key in self._caches if len(key) < len(ids) and ids[: len(key)] == key]
        if not fitting:
            return None
        longest = max(fitting, key=len)
        self._caches.move_to_end(longest)
        return self._caches[longest].fork(max_length=max_length)


def _size(cache: HybridCache) -> int:
    size = cache.num_bytes()
    return size.states + size.keys_values
