"""Transformers' ``config.json`` of a Mixtral model, as versions 4 and 5 write it, and ours."""

from collections.abc import Mapping
from typing import Any

from fivefold.moe.config import MoEConfig
from fivefold.moe.errors import MoEConfigError
from fivefold.parallel_core.config import replace

_REQUIRED: Any = object()
# Our name: their name, and what a file means that leaves it out.
_KEYS = {
    "vocab_size": ("vocab_size", _REQUIRED),
    "hidden_size": ("hidden_size", _REQUIRED),
    "num_layers": ("num_hidden_layers", _REQUIRED),
    "num_attention_heads": ("num_attention_heads", _REQUIRED),
    "num_key_value_heads": ("num_key_value_heads", 8),
    "head_dim": ("head_dim", None),
    "expert_intermediate_size": ("intermediate_size", _REQUIRED),
    "num_experts": ("num_local_experts", 8),
    "num_experts_per_token": ("num_experts_per_tok", 2),
    "max_position_embeddings": ("max_position_embeddings", 131072),
    "norm_eps": ("rms_norm_eps", 1e-5),
    "tie_word_embeddings": ("tie_word_embeddings", False),
    "sliding_window": ("sliding_window", None),
    "initializer_range": ("initializer_range", 0.02),
    "z_loss_coef": ("router_z_loss_coef", 0.0),
    "bos_token_id": ("bos_token_id", 1),
    "eos_token_id": ("eos_token_id", 2),
}
# Their keys that change what a model computes, with the only values that are computed here.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("mixtral",),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0.0, None),
    "router_jitter_noise": (0.0, None),
    "quantization_config": (None,),
}


def config_from_hf(config: Mapping[str, Any]) -> MoEConfig:
    """Read their configuration; keys that change nothing of the model are left aside.

    Raises:
        MoEConfigError: a key is missing, or has a value that this package does not compute.
    """
    for key, legal in _SUPPORTED.items():
        if key in config and config[key] not in legal:
            raise _unsupported(key, config[key], legal[0])
    values = {name: _get(config, key, default) for name, (key, default) in _KEYS.items()}
    for derived in ("num_key_value_heads", "head_dim"):
        values[derived] = values[derived] or 0
    ours = MoEConfig.from_dict(values | {"rope_theta": _rope_theta(config)})
    coef = _number(config, "router_aux_loss_coef", 0.001)
    return replace(ours, aux_loss_coef=_significant(coef * _aux_scale(ours)))


def config_to_hf(config: MoEConfig) -> dict[str, Any]:
    """Write their configuration; what it computes is what ours computes."""
    eos = config.eos_token_id
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": config.model_type,
        **{key: getattr(config, name) for name, (key, _) in _KEYS.items()},
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "hidden_act": "silu",
        "router_aux_loss_coef": _significant(config.aux_loss_coef / _aux_scale(config)),
        # Version 5 reads the first, version 4 and other readers the second.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
    }


def _get(config: Mapping[str, Any], key: str, default: Any) -> Any:
    value = config.get(key, default)
    if value is _REQUIRED:
        raise MoEConfigError(f"the model's config.json has no {key!r}")
    return value


def _rope_theta(config: Mapping[str, Any]) -> float:
    """The base, from version 5's ``rope_parameters`` or version 4's ``rope_theta``.

    Null is as good as absent: both versions write it for what was not given.
    """
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key) or {}
        if not isinstance(rope, Mapping):
            raise MoEConfigError(f"{key} is {rope!r} in config.json; it must be an object or null")
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind != "default":
            raise _unsupported(f"{key}.rope_type", kind, "default")
    new = config.get("rope_parameters") or {}
    return _number(new, "rope_theta", _number(config, "rope_theta", 1e6))


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    """A number of theirs; null is as good as absent."""
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MoEConfigError(f"{key} is {value!r} in config.json; it must be a number or null")
    return float(value)


def _aux_scale(config: MoEConfig) -> float:
    """Our balance loss coefficient over theirs.

    Theirs weighs one loss over the tokens of all layers, which is ``num_experts_per_token`` when
    balanced; ours weighs one for each layer, which is 1.
    """
    return config.num_experts_per_token / config.num_layers


def _significant(value: float) -> float:
    """Without the last bits, so that a coefficient survives the way there and back."""
    return float(f"{value:.12g}")


def _unsupported(key: str, value: Any, legal: Any) -> MoEConfigError:
    return MoEConfigError(f"{key} is {value!r} in config.json; only {legal!r} is supported")
