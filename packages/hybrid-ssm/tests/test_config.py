"""The configuration: what it derives, and what it refuses."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from fivefold.hybrid_ssm import HybridConfig
from fivefold.hybrid_ssm.errors import HybridConfigError
from fivefold.parallel_core.config import replace

Make = Callable[..., HybridConfig]


def test_derived_values_follow(tiny: Make) -> None:
    config = tiny(num_key_value_heads=0)
    assert (config.num_layers, config.mamba_width, config.head_dim) == (11, 128, 16)
    assert config.num_key_value_heads == 4
    wider = replace(HybridConfig.from_dict(config.to_dict()), hidden_size=128, head_dim=0)
    assert wider.head_dim == 32
    assert config.dt_limit == (0.0, float("inf"))
    assert tiny(time_step_limit=(0.1, 0.2)).dt_limit == (0.1, 0.2)


def test_plain_data_survives_json(tiny: Make) -> None:
    for config in (tiny(), tiny(time_step_limit=(0.1, 2.0), eos_token_id=(1, 2), latent_size=8)):
        assert HybridConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": ""}, "empty"),
        ({"pattern": "MQ"}, "layer 1 of pattern 'MQ' is 'Q'"),
        ({"num_mamba_heads": 0}, "num_mamba_heads is 0; .* >= 1 for the 'M' layers of pattern"),
        ({"num_groups": 3}, "num_mamba_heads 8 is not a multiple of num_groups 3; .* 1, 2, 4, 8$"),
        ({"num_attention_heads": 3}, "hidden_size 64 is not a multiple of num_attention_heads 3"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value"),
        ({"intermediate_size": 0}, "intermediate_size is 0; .* for the '-' layers"),
        ({"num_experts": 0}, "num_experts is 0; .* for the 'E' layers"),
        ({"num_experts_per_token": 5}, "num_experts_per_token is 5; it must be at most 4"),
        ({"num_expert_groups": 3}, "num_experts 4 is not a multiple of num_expert_groups 3"),
        ({"num_expert_groups": 4}, "num_expert_groups is 4; it must be 1 or at most 2"),
        ({"num_chosen_groups": 2}, "num_chosen_groups is 2; it must be at most num_expert_groups"),
        ({"latent_size": 0}, "latent_size is 0"),
        ({"time_step_limit": (0.2, 0.1)}, r"time_step_limit is \(0.2, 0.1\)"),
        ({"time_step_min": 0.2}, "time_step_min is 0.2; it must be above 0, at most"),
        ({"decay_range": (0.0, 1.0)}, "decay_range"),
        ({"norm_eps": -1.0}, "norm_eps is -1.0; it must be at least 0"),
        ({"eos_token_id": 97}, "token id 97 is outside the vocabulary of 97"),
        ({"model_type": "mamba2"}, "a mamba2 model has only 'M' layers"),
        (
            {"model_type": "mamba2", "pattern": "MM", "num_mamba_heads": 6},
            "num_mamba_heads \\* mamba_head_dim is 96; .* a multiple of hidden_size 64",
        ),
    ],
)
def test_impossible_values_are_named(changes: dict[str, Any], message: str, tiny: Make) -> None:
    with pytest.raises(HybridConfigError, match=message):
        tiny(**changes)


def test_sizes_matter_only_where_there_is_such_a_layer(tiny: Make) -> None:
    config = tiny(pattern="M", num_attention_heads=0, num_key_value_heads=0, num_experts=0)
    assert config.kinds == {"M"}
    with pytest.raises(HybridConfigError, match="num_experts is 0"):
        tiny(pattern="M", num_experts=0, num_nextn_predict_layers=1)
