"""Transformers' ``config.json`` of each family, as versions 4 and 5 write it, and ours."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fivefold.moe.config import MoEConfig
from fivefold.moe.errors import MoEConfigError
from fivefold.moe.families import FAMILIES
from fivefold.parallel_core.config import replace

_REQUIRED: Any = object()
Keys = Mapping[str, tuple[str, Any]]
"""Our name: their name, and what a file means that leaves it out."""

_ALL: Keys = {
    "vocab_size": ("vocab_size", _REQUIRED),
    "hidden_size": ("hidden_size", _REQUIRED),
    "num_layers": ("num_hidden_layers", _REQUIRED),
    "num_attention_heads": ("num_attention_heads", _REQUIRED),
    "tie_word_embeddings": ("tie_word_embeddings", False),
    "initializer_range": ("initializer_range", 0.02),
}
# What some versions of theirs write in place of the name that all versions read.
_RENAMED = {"num_experts": "num_local_experts"}
_TRAINING: Keys = {
    # No model of theirs computes these; they come back when the model does.
    "router.z_loss_coef": ("router_z_loss_coef", 0.0),
    "router.global_loss_coef": ("router_global_loss_coef", 0.0),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Dialect:
    """How one family writes its configuration.

    Attributes:
        keys: what it has besides ``_ALL`` and ``_TRAINING``.
        rope_theta: base of the rotary embedding that a file means that has none.
        supported: keys that change what a model computes, with the values that are computed here.
        implied: our fields that follow from the family.
        read: more of our fields, from theirs.
        write: more of their keys, from ours.
    """

    keys: Keys
    rope_theta: float
    supported: Mapping[str, tuple[Any, ...]]
    implied: Mapping[str, Any] = field(default_factory=dict)
    read: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda _: {}
    write: Callable[[MoEConfig], Mapping[str, Any]] = lambda _: {}


# ---- layers that are dense -----------------------------------------------------------------------


def _read_sparse_layers(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Qwen's rule: every ``decoder_sparse_step``-th layer has experts, but for those listed."""
    step, listed = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or ()
    num_layers = config.get("num_hidden_layers", 0)
    dense = tuple(i for i in range(num_layers) if i in listed or (i + 1) % step)
    return {
        "dense_layers": dense,
        "intermediate_size": _get(config, "intermediate_size", _REQUIRED) if dense else 0,
    }


def _write_sparse_layers(config: MoEConfig) -> Mapping[str, Any]:
    return {
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(config.dense_layers),
        # Theirs wants a width also where no layer has it.
        "intermediate_size": config.intermediate_size or config.expert_intermediate_size,
    }


def _read_first_layers(config: Mapping[str, Any]) -> Mapping[str, Any]:
    dense = tuple(range(_get(config, "first_k_dense_replace", 1)))
    width = _get(config, "moe_intermediate_size", 1408)
    return {
        "dense_layers": dense,
        "intermediate_size": _get(config, "intermediate_size", _REQUIRED) if dense else 0,
        "shared_intermediate_size": _get(config, "n_shared_experts", 1) * width,
        "rotary_fraction": _partial_rotary(config),
    }


def _write_first_layers(config: MoEConfig) -> Mapping[str, Any]:
    return {
        "first_k_dense_replace": len(config.dense_layers),
        "intermediate_size": config.intermediate_size or config.expert_intermediate_size,
        "n_shared_experts": config.shared_intermediate_size // config.expert_intermediate_size,
        "partial_rotary_factor": config.rotary_fraction,
        "num_nextn_predict_layers": 0,
    }


def _partial_rotary(config: Mapping[str, Any]) -> float:
    in_rope = config.get("rope_parameters") or {}
    return _number(in_rope, "partial_rotary_factor", _number(config, "partial_rotary_factor", 0.5))


def _read_window(config: Mapping[str, Any]) -> Mapping[str, Any]:
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    return {"sliding_window": window}


def _write_window(config: MoEConfig) -> Mapping[str, Any]:
    window = config.sliding_window
    return {"use_sliding_window": window is not None, "sliding_window": window}


# ---- the families --------------------------------------------------------------------------------

_COMMON_SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False, None),
    "attention_dropout": (0.0, None),
    "quantization_config": (None,),
}

_DIALECTS: Mapping[str, _Dialect] = {
    "mixtral": _Dialect(
        keys={
            "num_key_value_heads": ("num_key_value_heads", 8),
            "head_dim": ("head_dim", None),
            "expert_intermediate_size": ("intermediate_size", _REQUIRED),
            "num_experts": ("num_local_experts", 8),
            "num_experts_per_token": ("num_experts_per_tok", 2),
            "max_position_embeddings": ("max_position_embeddings", 131072),
            "norm_eps": ("rms_norm_eps", 1e-5),
            "sliding_window": ("sliding_window", None),
            "router.jitter": ("router_jitter_noise", 0.0),
            "bos_token_id": ("bos_token_id", 1),
            "eos_token_id": ("eos_token_id", 2),
        },
        rope_theta=1e6,
        supported={"attention_bias": (False, None)},
    ),
    "qwen2_moe": _Dialect(
        keys={
            "num_key_value_heads": ("num_key_value_heads", 16),
            "head_dim": ("head_dim", None),
            "qkv_bias": ("qkv_bias", True),
            "expert_intermediate_size": ("moe_intermediate_size", 1408),
            "num_experts": ("num_experts", 60),
            "num_experts_per_token": ("num_experts_per_tok", 4),
            "shared_intermediate_size": ("shared_expert_intermediate_size", 5632),
            "max_position_embeddings": ("max_position_embeddings", 32768),
            "norm_eps": ("rms_norm_eps", 1e-6),
            "router.normalize": ("norm_topk_prob", False),
            "bos_token_id": ("bos_token_id", None),
            "eos_token_id": ("eos_token_id", None),
        },
        rope_theta=1e4,
        # With it, every second layer has a window.
        supported={"use_sliding_window": (False, None)},
        implied={"shared_gate": True},
        read=_read_sparse_layers,
        write=_write_sparse_layers,
    ),
    "qwen3_moe": _Dialect(
        keys={
            "num_key_value_heads": ("num_key_value_heads", 4),
            "head_dim": ("head_dim", None),
            "expert_intermediate_size": ("moe_intermediate_size", 768),
            "num_experts": ("num_experts", 128),
            "num_experts_per_token": ("num_experts_per_tok", 8),
            "max_position_embeddings": ("max_position_embeddings", 32768),
            "norm_eps": ("rms_norm_eps", 1e-6),
            "router.normalize": ("norm_topk_prob", False),
            "bos_token_id": ("bos_token_id", None),
            "eos_token_id": ("eos_token_id", None),
        },
        rope_theta=1e4,
        supported={"attention_bias": (False, None)},
        implied={"qk_norm": True},
        read=lambda config: {**_read_sparse_layers(config), **_read_window(config)},
        write=lambda config: {**_write_sparse_layers(config), **_write_window(config)},
    ),
    "glm4_moe": _Dialect(
        keys={
            "num_key_value_heads": ("num_key_value_heads", 8),
            "head_dim": ("head_dim", None),
            "qkv_bias": ("attention_bias", False),
            "qk_norm": ("use_qk_norm", False),
            "expert_intermediate_size": ("moe_intermediate_size", 1408),
            "num_experts": ("n_routed_experts", 128),
            "num_experts_per_token": ("num_experts_per_tok", 8),
            "max_position_embeddings": ("max_position_embeddings", 131072),
            "norm_eps": ("rms_norm_eps", 1e-5),
            "router.normalize": ("norm_topk_prob", True),
            "router.scale": ("routed_scaling_factor", 1.0),
            "router.num_groups": ("n_group", 1),
            "router.groups_per_token": ("topk_group", 1),
            "bos_token_id": ("bos_token_id", None),
            "eos_token_id": ("eos_token_id", None),
        },
        rope_theta=1e4,
        supported={},
        implied={"router.score": "sigmoid", "router.expert_bias": True},
        read=_read_first_layers,
        write=_write_first_layers,
    ),
}


def config_from_hf(config: Mapping[str, Any]) -> MoEConfig:
    """Read their configuration; keys that change nothing of the model are left aside.

    Raises:
        MoEConfigError: a key is missing, or has a value that this package does not compute.
    """
    kind = config.get("model_type", _REQUIRED)
    if kind is _REQUIRED or kind not in _DIALECTS:
        found = "missing" if kind is _REQUIRED else repr(kind)
        raise MoEConfigError(
            f"model_type is {found} in config.json; legal: {', '.join(map(repr, _DIALECTS))}"
        )
    dialect = _DIALECTS[kind]
    for key, legal in {**_COMMON_SUPPORTED, **dialect.supported}.items():
        if key in config and config[key] not in legal:
            raise _unsupported(key, config[key], legal[0])
    keys = {**_ALL, **_TRAINING, **dialect.keys}
    renamed = {old: config[new] for old, new in _RENAMED.items() if new in config}
    values = {name: _get({**renamed, **config}, *key) for name, key in keys.items()}
    values |= {"model_type": kind, **dialect.implied, **dialect.read(config)}
    for derived in ("num_key_value_heads", "head_dim"):
        values[derived] = values[derived] or 0
    values["rope_theta"] = _rope_theta(config, dialect.rope_theta)
    values["router.aux_loss_coef"] = 0.0
    ours = MoEConfig.from_dict(_nested(values))
    coef = _number(config, "router_aux_loss_coef", 0.001 if kind != "glm4_moe" else 0.0)
    coef = _rounded(coef * _aux_scale(ours))
    return replace(ours, router=replace(ours.router, aux_loss_coef=coef))


def config_to_hf(config: MoEConfig) -> dict[str, Any]:
    """Write their configuration; what it computes is what ours computes."""
    dialect = _DIALECTS[config.model_type]
    eos = config.eos_token_id
    keys = {**_ALL, **_TRAINING, **dialect.keys}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rotary_fraction != 1:
        rope["partial_rotary_factor"] = config.rotary_fraction
    return {
        "architectures": [FAMILIES[config.model_type].architecture],
        "model_type": config.model_type,
        **{key: _field(config, name) for name, (key, _) in keys.items()},
        **dialect.write(config),
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "hidden_act": "silu",
        "router_aux_loss_coef": _their_aux_loss_coef(config),
        # Version 5 reads the first, version 4 and other readers the second.
        "rope_parameters": rope,
        "rope_theta": config.rope_theta,
    }


def _field(config: MoEConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """``{"router.scale": 2}`` to ``{"router": {"scale": 2}}``."""
    tables: dict[str, Any] = {}
    for name, value in values.items():
        table, _, key = name.rpartition(".")
        (tables.setdefault(table, {}) if table else tables)[key] = value
    return tables


def _get(config: Mapping[str, Any], key: str, default: Any) -> Any:
    value = config.get(key, default)
    if value is _REQUIRED:
        raise MoEConfigError(f"the model's config.json has no {key!r}")
    return value


def _rope_theta(config: Mapping[str, Any], default: float) -> float:
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
    return _number(new, "rope_theta", _number(config, "rope_theta", default))


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

    Theirs weighs one loss over the tokens of all layers with experts, which is
    ``num_experts_per_token`` when balanced; ours weighs one for each such layer, which is 1.
    """
    return config.num_experts_per_token / (config.num_layers - len(config.dense_layers))


def _their_aux_loss_coef(config: MoEConfig) -> float:
    """The number that is read back as ours; a short one where there is one."""
    ours, scale = config.router.aux_loss_coef, _aux_scale(config)
    short = _rounded(ours / scale)
    return short if _rounded(short * scale) == ours else ours / scale


def _rounded(value: float) -> float:
    """Without the last bits, which multiplying there and back changes."""
    return float(f"{value:.15g}")


def _unsupported(key: str, value: Any, legal: Any) -> MoEConfigError:
    return MoEConfigError(f"{key} is {value!r} in config.json; only {legal!r} is supported")
