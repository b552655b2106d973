"""Decoders of fivefold-hybrid-ssm as the planner sees them."""

from collections.abc import Mapping
from typing import Any

from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.planner.models import Experts, Mamba, ModelShape

_UNKNOWN = ("use_bias", "mlp_bias", "latent_size", "residual_in_fp32")
"""What changes bytes, and is not counted."""


def hybrid_shape_of(model: Mapping[str, Any]) -> ModelShape:
    """What a hybrid decoder's configuration, as plain data, is to the planner.

    Args:
        model: ``HybridConfig.to_dict()`` of fivefold-hybrid-ssm, or the "model" table of a run.

    Raises:
        ConfigError: it has what the planner does not count: biases of projections, experts of
            projected inputs, a residual in float32.
    """
    unknown = [name for name in _UNKNOWN if model.get(name)]
    if unknown:
        raise ConfigError(
            f"the planner does not count {', '.join(unknown)}; legal: a model without them"
        )
    pattern = model["pattern"]
    return ModelShape(
        name=model.get("model_type", "model"),
        hidden=model["hidden_size"],
        num_layers=len(pattern),
        num_heads=model.get("num_attention_heads") or 1,
        num_kv_heads=model.get("num_key_value_heads") or None,
        head_dim=model.get("head_dim") or None,
        vocabulary=model["vocab_size"],
        ffn=model.get("intermediate_size") or None,
        tied=bool(model.get("tie_word_embeddings")),
        rotate=False,
        pattern=pattern.replace("E", "X"),
        experts=_experts(model) if "E" in pattern else None,
        mamba=_mamba(model) if "M" in pattern else None,
    )


def _experts(model: Mapping[str, Any]) -> Experts:
    return Experts(
        num_experts=model["num_experts"],
        top_k=model.get("num_experts_per_token", 2),
        ffn=model["expert_intermediate_size"],
        shared_ffn=model.get("shared_intermediate_size") or 0,
        score="sigmoid",
        normalize=model.get("normalise_weights", True),
    )


def _mamba(model: Mapping[str, Any]) -> Mamba:
    return Mamba(
        num_heads=model["num_mamba_heads"],
        head_dim=model.get("mamba_head_dim", 64),
        state=model.get("state_size", 128),
        num_groups=model.get("num_groups", 8),
        window=model.get("conv_width", 4),
        chunk=model.get("chunk_size", 128),
    )
