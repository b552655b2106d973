"""``config.json`` of Nemotron-H and Mamba-2 models, in the dialects that files have, and ours."""

import math
from collections.abc import Mapping
from typing import Any

from fivefold.hybrid_ssm.config import HybridConfig
from fivefold.hybrid_ssm.errors import HybridConfigError
from fivefold.hybrid_ssm.pattern import (
    ATTENTION,
    EXPERTS,
    MAMBA,
    MLP,
    parse_pattern,
    pattern_of_words,
)

# A limit beyond this is none: files write infinity so, as JSON has no infinity.
_FLOAT32_MAX = 3.4028234663852886e38

# Our name: their names, the first of which we write, and what a file means that leaves it out.
# transformers leaves out what equals the defaults of its class, so these are its defaults.
_COMMON: dict[str, tuple[tuple[str, ...], Any]] = {
    "hidden_size": (("hidden_size",), 4096),
    "norm_eps": (("layer_norm_epsilon",), 1e-5),
    "tie_word_embeddings": (("tie_word_embeddings",), False),
    "use_bias": (("use_bias",), False),
    "conv_width": (("conv_kernel", "mamba_d_conv"), 4),
    "use_conv_bias": (("use_conv_bias", "mamba_conv_bias"), True),
    "num_groups": (("n_groups", "mamba_n_groups"), 8),
    "time_step_min": (("time_step_min", "mamba_dt_min"), 0.001),
    "time_step_max": (("time_step_max", "mamba_dt_max"), 0.1),
    "time_step_floor": (("time_step_floor", "mamba_dt_init_floor"), 1e-4),
}
_NEMOTRON_H: dict[str, tuple[tuple[str, ...], Any]] = {
    **_COMMON,
    "vocab_size": (("vocab_size",), 131072),
    "num_mamba_heads": (("mamba_num_heads",), 128),
    "mamba_head_dim": (("mamba_head_dim",), 64),
    "state_size": (("ssm_state_size",), 128),
    "chunk_size": (("chunk_size", "mamba_chunk_size"), 128),
    "num_attention_heads": (("num_attention_heads",), 32),
    "num_key_value_heads": (("num_key_value_heads",), 8),
    "head_dim": (("head_dim", "attention_head_dim"), 128),
    "intermediate_size": (("intermediate_size",), 21504),
    "mlp_bias": (("mlp_bias",), False),
    "num_experts": (("n_routed_experts",), 8),
    "num_experts_per_token": (("num_experts_per_tok",), 2),
    "expert_intermediate_size": (("moe_intermediate_size",), 7688),
    "shared_intermediate_size": (("moe_shared_expert_intermediate_size",), 7688),
    "latent_size": (("moe_latent_size",), None),
    "num_expert_groups": (("n_group",), 1),
    "num_chosen_groups": (("topk_group",), 1),
    "normalise_weights": (("norm_topk_prob",), True),
    "routed_scaling_factor": (("routed_scaling_factor",), 1.0),
    "num_nextn_predict_layers": (("num_nextn_predict_layers",), 0),
    "residual_in_fp32": (("residual_in_fp32",), False),
    "max_position_embeddings": (("max_position_embeddings",), 4096),
    "initializer_range": (("initializer_range",), 0.02),
    "pad_token_id": (("pad_token_id",), 0),
    "bos_token_id": (("bos_token_id",), 1),
    "eos_token_id": (("eos_token_id",), 2),
}
_MAMBA2: dict[str, tuple[tuple[str, ...], Any]] = {
    **_COMMON,
    "vocab_size": (("vocab_size",), 32768),
    "num_mamba_heads": (("num_heads",), 128),
    "mamba_head_dim": (("head_dim",), 64),
    "state_size": (("state_size",), 128),
    "chunk_size": (("chunk_size",), 256),
    "residual_in_fp32": (("residual_in_fp32",), True),
    "initializer_range": (("initializer_range",), 0.1),
    "pad_token_id": (("pad_token_id",), 1),
    "bos_token_id": (("bos_token_id",), 0),
    "eos_token_id": (("eos_token_id",), 2),
}
_TABLES = {"nemotron_h": _NEMOTRON_H, "mamba2": _MAMBA2}
# Left out of a file, and unread, where the pattern has no layer of the kind.
_OF_KIND = {
    MAMBA: ("num_mamba_heads", "mamba_head_dim", "state_size", "num_groups", "conv_width"),
    ATTENTION: ("num_attention_heads", "num_key_value_heads", "head_dim"),
    MLP: ("intermediate_size",),
    EXPERTS: (
        "num_experts",
        "num_experts_per_token",
        "expert_intermediate_size",
        "shared_intermediate_size",
        "latent_size",
        "num_expert_groups",
        "num_chosen_groups",
        "normalise_weights",
        "routed_scaling_factor",
    ),
}
# Their keys that change what a model computes, with the only values that are computed here.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mamba_hidden_act": ("silu",),
    "mlp_hidden_act": ("relu2",),
    "attention_bias": (False, None),
    "attention_dropout": (0.0, None),
    "hidden_dropout": (0.0, None),
    "sliding_window": (None,),
}


def config_from_hf(config: Mapping[str, Any]) -> HybridConfig:
    """Read their configuration; keys that change nothing of the model are left aside.

    Raises:
        HybridConfigError: a key has a value that cannot be, or that this package does not compute.
    """
    kind = config.get("model_type")
    if kind not in _TABLES:
        raise _unsupported("model_type", kind, tuple(_TABLES))
    for key, legal in _SUPPORTED.items():
        if key in config and config[key] not in legal:
            raise _unsupported(key, config[key], legal)
    values: dict[str, Any] = {"model_type": kind, **_layers(config, kind)}
    present = values["pattern"] + (
        values["mtp_pattern"] if config.get("num_nextn_predict_layers") else ""
    )
    idle = [name for letter in set(_OF_KIND) - set(present) for name in _OF_KIND[letter]]
    for name, (keys, default) in _TABLES[kind].items():
        if name not in idle:
            values[name] = _get(config, keys, default)
    if values.get("num_key_value_heads", 0) is None:
        values["num_key_value_heads"] = 0
    values["time_step_limit"] = _limit(config)
    return HybridConfig.from_dict(values)


def config_to_hf(config: HybridConfig) -> dict[str, Any]:
    """Write their configuration; what it computes is what ours computes.

    The layers are written as ``hybrid_override_pattern``, which both read. The other names, which
    transformers' class writes too, would keep the remote code of the first releases from loading:
    there ``layers_block_type`` is a property without a setter, and its base class refuses
    ``layer_types`` with an MLP among them.
    """
    idle = [name for letter in set(_OF_KIND) - config.kinds for name in _OF_KIND[letter]]
    written = {
        key: getattr(config, name)
        for name, (keys, _) in _TABLES[config.model_type].items()
        if name not in idle
        for key in _written(keys)
    }
    eos, (low, high) = config.eos_token_id, config.time_step_limit
    written["eos_token_id"] = list(eos) if isinstance(eos, tuple) else eos
    if low > 0 or high is not None:
        written["time_step_limit"] = [low, _FLOAT32_MAX if high is None else high]
    if config.model_type == "mamba2":
        layers = _mamba2_layers(config)
    else:
        layers = _nemotron_layers(config)
    return {
        "model_type": config.model_type,
        **layers,
        **written,
        "expand": max(1, config.mamba_width // config.hidden_size),
    }


def _mamba2_layers(config: HybridConfig) -> dict[str, Any]:
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "num_hidden_layers": config.num_layers,
        "hidden_act": "silu",
    }


def _nemotron_layers(config: HybridConfig) -> dict[str, Any]:
    layers: dict[str, Any] = {
        "architectures": ["NemotronHForCausalLM"],
        "num_hidden_layers": config.num_layers,
        "hybrid_override_pattern": config.pattern,
        "mlp_hidden_act": "relu2",
        "mamba_hidden_act": "silu",
    }
    if config.num_nextn_predict_layers:
        layers["mtp_hybrid_override_pattern"] = config.mtp_pattern
    return layers


def _written(keys: tuple[str, ...]) -> tuple[str, ...]:
    """The names under which a value is written: older readers know only the older head_dim."""
    return keys if "attention_head_dim" in keys else keys[:1]


def _layers(config: Mapping[str, Any], kind: str) -> dict[str, str]:
    """``pattern`` and ``mtp_pattern``, from whichever key there is; all that are must agree."""
    count = config.get("num_hidden_layers")
    if kind == "mamba2":
        return {"pattern": MAMBA * (64 if count is None else count)}
    found: dict[str, str] = {}
    depths = ""
    if config.get("hybrid_override_pattern") is not None:
        key = "hybrid_override_pattern"
        found[key], depths = parse_pattern(str(config[key]))
    for key in ("layers_block_type", "layer_types"):
        if config.get(key) is not None:
            found[key] = pattern_of_words(config[key], key)
    if len(set(found.values())) > 1:
        said = ", ".join(f"{key} {pattern}" for key, pattern in found.items())
        raise HybridConfigError(f"config.json says two things of its layers: {said}")
    pattern = next(iter(found.values()), "ME*-")
    if count is not None and count != len(pattern):
        raise HybridConfigError(
            f"num_hidden_layers is {count} in config.json, which has {len(pattern)} layers: "
            f"{pattern}"
        )
    return {"pattern": pattern, "mtp_pattern": _mtp_pattern(config, depths)}


def _mtp_pattern(config: Mapping[str, Any], depths: str) -> str:
    if config.get("mtp_hybrid_override_pattern"):
        return parse_pattern(str(config["mtp_hybrid_override_pattern"]))[0]
    if config.get("mtp_layers_block_type"):
        return pattern_of_words(config["mtp_layers_block_type"], "mtp_layers_block_type")
    return depths or "*E"


def _get(config: Mapping[str, Any], keys: tuple[str, ...], default: Any) -> Any:
    return next((config[key] for key in keys if key in config), default)


def _limit(config: Mapping[str, Any]) -> tuple[float, float | None]:
    """Limits of the time step; infinity has four spellings."""
    limit = _get(config, ("time_step_limit", "mamba_dt_limit"), None)
    if limit is None:
        return 0.0, None
    if not isinstance(limit, list | tuple) or len(limit) != 2:
        raise HybridConfigError(f"time_step_limit is {limit!r} in config.json; it must be a pair")
    low, high = (_number(value) for value in limit)
    return low, None if high >= _FLOAT32_MAX else high


def _number(value: Any) -> float:
    """A number of theirs, where transformers may have wrapped it as ``{"__float__": "..."}``."""
    if isinstance(value, Mapping):
        value = value.get("__float__")
    if isinstance(value, str) and value.lower().strip("+") in ("infinity", "inf"):
        return math.inf
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise HybridConfigError(f"time_step_limit has {value!r} in config.json; expected a number")
    return float(value)


def _unsupported(key: str, value: Any, legal: tuple[Any, ...]) -> HybridConfigError:
    shown = ", ".join(repr(one) for one in legal)
    return HybridConfigError(f"{key} is {value!r} in config.json; supported: {shown}")
