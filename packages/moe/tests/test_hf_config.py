import json
from collections.abc import Callable
from typing import Any

import pytest
from transformers import MixtralConfig

from fivefold.moe import MoEConfig
from fivefold.moe.errors import MoEConfigError
from fivefold.moe.router_config import RouterConfig

# As published with mistralai/Mixtral-8x7B-v0.1 (transformers 4.36).
MIXTRAL_8X7B: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}


def test_version_4_file() -> None:
    config = MoEConfig.from_hf(MIXTRAL_8X7B)
    assert (config.num_layers, config.head_dim, config.num_experts) == (32, 128, 8)
    assert (config.expert_intermediate_size, config.num_key_value_heads) == (14336, 8)
    assert (config.rope_theta, config.bos_token_id, config.eos_token_id) == (1e6, 1, 2)
    # Their one loss of 0.02 * k when balanced is ours of coef over 32 layers.
    assert config.router.aux_loss_coef * 32 == pytest.approx(0.02 * 2, rel=1e-12)


def test_version_5_object_and_defaults() -> None:
    theirs = MixtralConfig(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    config = MoEConfig.from_hf(theirs.to_dict())
    assert config.rope_theta == 5e5
    assert config.max_position_embeddings == theirs.max_position_embeddings
    bare = {"model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"}
    shortest = {key: MIXTRAL_8X7B[key] for key in (*bare, "intermediate_size")}
    described = MixtralConfig(**shortest).to_dict()
    assert MoEConfig.from_hf(shortest) == MoEConfig.from_hf(described)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_dim": 6, "num_key_value_heads": 4, "rope_theta": 1234.5},
        {"num_layers": 3, "num_experts_per_token": 3, "router": RouterConfig(aux_loss_coef=0.003)},
        {"eos_token_id": (2, 3), "bos_token_id": 1, "tie_word_embeddings": True},
        {"sliding_window": 7, "router": RouterConfig(z_loss_coef=1e-3), "norm_eps": 1e-6},
    ],
)
def test_round_trip_through_transformers(
    tiny: Callable[..., MoEConfig], changes: dict[str, Any]
) -> None:
    config = tiny(**changes)
    assert MoEConfig.from_hf(config.to_hf()) == config
    theirs = MixtralConfig.from_dict(json.loads(json.dumps(config.to_hf())))
    assert MoEConfig.from_hf(theirs.to_dict()) == config


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "llama", "model_type is 'llama' in config.json; legal: 'mixtral', 'qwen2"),
        ("hidden_act", "gelu", "hidden_act is 'gelu'.* only 'silu'"),
        ("attention_bias", True, "attention_bias is True .* only False"),
        ("attention_dropout", 0.1, r"attention_dropout is 0\.1"),
        ("quantization_config", {"bits": 4}, "quantization_config is {'bits': 4}"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "rope_scaling.* is 'linear'"),
        ("rope_parameters", {"rope_type": "yarn"}, "rope_parameters.rope_type is 'yarn'"),
        ("head_dim", 7, "head_dim is 7; it must be even"),
    ],
)
def test_unsupported_values_name_the_key(key: str, value: Any, message: str) -> None:
    with pytest.raises(MoEConfigError, match=message):
        MoEConfig.from_hf(MIXTRAL_8X7B | {key: value})


def test_missing_key() -> None:
    short = {key: value for key, value in MIXTRAL_8X7B.items() if key != "hidden_size"}
    with pytest.raises(MoEConfigError, match=r"config\.json has no 'hidden_size'"):
        MoEConfig.from_hf(short)


@pytest.mark.parametrize(
    "key", ["rope_theta", "rope_parameters", "rope_scaling", "router_aux_loss_coef"]
)
def test_null_is_as_good_as_absent(key: str) -> None:
    absent = {name: value for name, value in MIXTRAL_8X7B.items() if name != key}
    assert MoEConfig.from_hf(absent | {key: None}) == MoEConfig.from_hf(absent)


def test_nulls_inside_rope_parameters() -> None:
    rope = {"rope_type": None, "rope_theta": None}
    config = MoEConfig.from_hf(MIXTRAL_8X7B | {"rope_theta": 5e4, "rope_parameters": rope})
    assert config.rope_theta == 5e4


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rope_theta", "1e6", "rope_theta is '1e6' in config.json; it must be a number or null"),
        ("router_aux_loss_coef", [1], r"router_aux_loss_coef is \[1\]"),
        ("rope_parameters", 3, "rope_parameters is 3 in config.json; it must be an object or null"),
    ],
)
def test_values_of_another_kind_name_the_key(key: str, value: Any, message: str) -> None:
    with pytest.raises(MoEConfigError, match=message):
        MoEConfig.from_hf(MIXTRAL_8X7B | {key: value})
