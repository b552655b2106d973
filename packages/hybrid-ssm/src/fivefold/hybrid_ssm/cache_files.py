"""A cache as one safetensors file."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from fivefold.hybrid_ssm.cache import HybridCache
from fivefold.hybrid_ssm.config import HybridConfig
from fivefold.hybrid_ssm.errors import HybridWeightsError
from fivefold.hybrid_ssm.pattern import ATTENTION, MAMBA
from fivefold.parallel_core.files import atomic_write_bytes

FORMAT = "fivefold-hybrid-ssm cache 1"


def save_cache(cache: HybridCache, path: str | Path, config: HybridConfig) -> None:
    """Write a cache, all or nothing; keys and values of the tokens that there are, and no room.

    Args:
        cache: of a whole model.
        path: of the file.
        config: the model's; only a model of this shape can go on.
    """
    described = {
        "format": FORMAT,
        "length": str(cache.length),
        "shape": json.dumps(_shape(config)),
    }
    atomic_write_bytes(path, save(_tensors(cache), metadata=described))


def load_cache(
    path: str | Path,
    config: HybridConfig,
    max_length: int | None = None,
    device: torch.device | str = "cpu",
) -> HybridCache:
    """Read a cache that ``save_cache`` wrote.

    Args:
        path: of the file.
        config: of the model that goes on with it.
        max_length: room for tokens in all; the default is for those that there are.
        device: where to put it.

    Raises:
        HybridWeightsError: the file is missing, is no cache, or of another model's.
        HybridInputError: ``max_length`` is less than what there is.
    """
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            described = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise HybridWeightsError(f"cannot read a cache from {path}: {error}") from None
    if described.get("format") != FORMAT:
        raise HybridWeightsError(
            f"{path} is not a cache: its format is {described.get('format')!r}, not {FORMAT!r}"
        )
    found, wanted = json.loads(described["shape"]), _shape(config)
    for key, value in wanted.items():
        if found.get(key) != value:
            raise HybridWeightsError(
                f"{path} is the cache of a model with {key}={found.get(key)!r}; this one has "
                f"{value!r}"
            )
    return _fill(tensors, int(described["length"])).fork(max_length)


def _shape(config: HybridConfig) -> dict[str, object]:
    """What a cache depends on of a model's configuration."""
    names = ["model_type", "hidden_size", "pattern"]
    if MAMBA in config.pattern:
        names += ["num_mamba_heads", "mamba_head_dim", "state_size", "num_groups", "conv_width"]
    if ATTENTION in config.pattern:
        names += ["num_key_value_heads", "head_dim"]
    return {name: getattr(config, name) for name in names}


def _tensors(cache: HybridCache) -> dict[str, Tensor]:
    tensors: dict[str, Tensor | None] = {}
    for name, state in cache.states.items():
        tensors |= {f"{name}.conv": state.conv, f"{name}.ssm": state.ssm}
    for name, kept in cache.attention.items():
        if kept.keys is not None and kept.values is not None:
            tensors[f"{name}.keys"] = kept.keys[:, : cache.length]
            tensors[f"{name}.values"] = kept.values[:, : cache.length]
    if cache.key_mask is not None:
        tensors["key_mask"] = cache.key_mask[:, : cache.length]
    return {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}


def _fill(tensors: dict[str, Tensor], length: int) -> HybridCache:
    cache = HybridCache(max(length, 1))
    cache.key_mask = tensors.pop("key_mask", None)
    for key, tensor in tensors.items():
        name, _, what = key.rpartition(".")
        owner = cache.state(name) if what in ("conv", "ssm") else cache.keys_values(name)
        setattr(owner, what, tensor)
    cache.length = length
    return cache
