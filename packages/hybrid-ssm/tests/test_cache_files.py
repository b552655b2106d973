"""Caches as files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fivefold.hybrid_ssm import HybridCache, HybridForCausalLM
from fivefold.hybrid_ssm.cache_files import load_cache, save_cache
from fivefold.hybrid_ssm.errors import HybridInputError, HybridWeightsError

from .conftest import tiny_config
from .test_model import tokens

Oracle = Callable[..., tuple[HybridForCausalLM, Any]]


@pytest.mark.parametrize("pattern", ["M-M*-ME*EM-", "M-M-", "*-"])
@torch.no_grad()
def test_a_loaded_cache_goes_on_as_the_saved_one(
    pattern: str, oracle: Oracle, tmp_path: Path
) -> None:
    model, _ = oracle(tiny_config(pattern=pattern))
    ids, mask = tokens(2, 15), torch.ones(2, 11, dtype=torch.bool)
    mask[1, :4] = False
    cache = HybridCache(40)
    model(ids[:, :11], cache, attention_mask=mask)
    save_cache(cache, tmp_path / "cache.safetensors", model.config)
    again = load_cache(tmp_path / "cache.safetensors", model.config, max_length=15)
    assert (again.length, again.max_length) == (11, 15)
    assert torch.equal(model(ids[:, 11:], again), model(ids[:, 11:], cache))
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["cache.safetensors"]


@torch.no_grad()
def test_a_file_holds_no_room_for_tokens_to_come(oracle: Oracle, tmp_path: Path) -> None:
    model, _ = oracle(tiny_config(pattern="M*"))
    sizes = []
    for room in (12, 1200):
        cache = HybridCache(room)
        model(tokens(1, 12), cache)
        save_cache(cache, tmp_path / "cache.safetensors", model.config)
        sizes.append((tmp_path / "cache.safetensors").stat().st_size)
    assert sizes[0] == sizes[1]


def test_what_is_no_cache_of_the_model_is_refused(oracle: Oracle, tmp_path: Path) -> None:
    model, _ = oracle(tiny_config(pattern="M*"))
    path = tmp_path / "cache.safetensors"
    with pytest.raises(HybridWeightsError, match="cannot read a cache from"):
        load_cache(path, model.config)
    path.write_bytes(b"nothing")
    with pytest.raises(HybridWeightsError, match="cannot read a cache from"):
        load_cache(path, model.config)
    with pytest.raises(HybridWeightsError, match="its format is 'pt'"):
        load_cache(tmp_path / "oracle" / "model.safetensors", model.config)
    cache = HybridCache(5)
    with torch.no_grad():
        model(tokens(1, 5), cache)
    save_cache(cache, path, model.config)
    with pytest.raises(HybridWeightsError, match="pattern='M\\*'; this one has 'MM'"):
        load_cache(path, tiny_config(pattern="MM"))
    with pytest.raises(HybridWeightsError, match="state_size=16; this one has 32"):
        load_cache(path, tiny_config(pattern="M*", state_size=32))
    with pytest.raises(HybridInputError, match="max_length=4 is less"):
        load_cache(path, model.config, max_length=4)
