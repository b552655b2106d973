"""Beginnings of texts that are read once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fivefold.hybrid_ssm import HybridCache, HybridForCausalLM
from fivefold.hybrid_ssm.errors import HybridInputError
from fivefold.hybrid_ssm.prefixes import PrefixStore

from .conftest import tiny_config
from .test_model import tokens

Oracle = Callable[..., tuple[HybridForCausalLM, Any]]


@pytest.mark.parametrize("pattern", ["M-M*-ME*EM-", "M-M-"])
def test_a_kept_beginning_gives_the_same_continuation(pattern: str, oracle: Oracle) -> None:
    model, _ = oracle(tiny_config(pattern=pattern))
    ids = tokens(1, 30)[0].tolist()
    store = PrefixStore(1 << 24)
    store.read(model, ids[:10], chunk_size=4)
    store.read(model, ids[:20])
    read: list[int] = []
    model.layers["0"].register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    cache = store.cache_for(ids, max_length=50)
    assert cache is not None and cache.length == 20
    found = model.generate([ids], max_new_tokens=20, past_key_values=cache)
    assert read[0] == 10
    assert torch.equal(found, model.generate([ids], max_new_tokens=20))
    # The store's own copies were not touched.
    again = store.cache_for(ids, max_length=50)
    assert again is not None and again.length == 20
    assert store.cache_for(ids[:20], 30).length == 10  # type: ignore[union-attr]
    assert store.cache_for(ids[:10], 30) is None
    assert store.cache_for([1, 2, *ids], 50) is None


def test_the_least_recently_used_goes_first(oracle: Oracle) -> None:
    model, _ = oracle(tiny_config(pattern="M-"))
    one = PrefixStore(1 << 24)
    one.read(model, [1])
    store = PrefixStore(2 * one.num_bytes)
    store.read(model, [1])
    store.read(model, [2])
    assert store.cache_for([1, 0], 9) is not None
    store.read(model, [3])
    assert len(store) == 2
    assert store.cache_for([2, 0], 9) is None
    assert store.cache_for([1, 0], 9) is not None
    tight = PrefixStore(one.num_bytes - 1)
    tight.read(model, [1])
    assert len(tight) == 0


def test_what_cannot_be_kept_is_refused(oracle: Oracle) -> None:
    model, _ = oracle(tiny_config(pattern="M-"))
    with pytest.raises(HybridInputError, match="max_bytes is 0"):
        PrefixStore(0)
    with pytest.raises(HybridInputError, match="beginning of no tokens"):
        PrefixStore(9).read(model, [])
    with pytest.raises(HybridInputError, match="has read 0 tokens, and 2 ids came"):
        PrefixStore(9).keep([1, 2], HybridCache(4))
