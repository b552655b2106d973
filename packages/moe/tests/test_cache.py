import pytest
import torch

from fivefold.moe.cache import KVCache, LayerCache
from fivefold.moe.errors import MoEInputError


def test_tokens_come_back_in_order_from_memory_taken_once() -> None:
    cache = LayerCache(6)
    k, v = torch.randn(2, 3, 6, 2, 4).unbind()
    places = set()
    for start, stop in ((0, 3), (3, 4), (4, 6)):
        keys, values = cache.append(k[:, start:stop], v[:, start:stop])
        assert torch.equal(keys, k[:, :stop]) and torch.equal(values, v[:, :stop])
        places.add(keys.data_ptr())
    assert len(places) == 1 and cache.length == 6


def test_no_room() -> None:
    cache = LayerCache(3)
    x = torch.zeros(1, 2, 1, 4)
    cache.append(x, x)
    with pytest.raises(MoEInputError, match="room for 3 tokens and holds 2; 2 more do not fit"):
        cache.append(x, x)


def test_layers_are_separate() -> None:
    cache = KVCache(4)
    assert cache.length == 0
    x = torch.zeros(1, 2, 1, 4)
    cache.layer("0").append(x, x)
    assert cache.length == 2 and cache.layer("0").length == 2
    cache.layer("1").append(x[:, :1], x[:, :1])
    assert cache.length == 1
