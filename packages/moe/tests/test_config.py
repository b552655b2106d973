from collections.abc import Callable
from typing import Any

import pytest

from fivefold.moe import MoEConfig, MoEError
from fivefold.parallel_core.config import override
from fivefold.parallel_core.errors import ConfigError


def test_derived_sizes(tiny: Callable[..., MoEConfig]) -> None:
    config = tiny(hidden_size=48, num_attention_heads=6, num_key_value_heads=0)
    assert (config.head_dim, config.num_key_value_heads) == (8, 6)
    assert tiny(head_dim=10).head_dim == 10


def test_dict_round_trip(tiny: Callable[..., MoEConfig]) -> None:
    for changes in ({}, {"head_dim": 6}, {"eos_token_id": (1, 2)}, {"sliding_window": 3}):
        config = tiny(**changes)
        assert MoEConfig.from_dict(config.to_dict()) == config


def test_derived_sizes_follow_an_override(tiny: Callable[..., MoEConfig]) -> None:
    changed = override(tiny(num_key_value_heads=4), {"hidden_size": "64"})
    assert (changed.head_dim, changed.num_key_value_heads) == (16, 4)
    assert override(tiny(num_key_value_heads=4), {"num_attention_heads": "8"}).head_dim == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size is 0; it must be an integer of at least 1"),
        ({"num_layers": -2}, "num_layers is -2; it must be an integer of at least 1"),
        ({"num_experts": 2.0}, r"num_experts is 2\.0; it must be an integer"),
        ({"hidden_size": 30}, "hidden_size 30 is not a multiple of num_attention_heads 4"),
        (
            {"num_key_value_heads": 3},
            r"num_attention_heads 4 is not a multiple of num_key_value_heads 3 \(remainder 1\)",
        ),
        ({"head_dim": 7}, "head_dim is 7; it must be even"),
        ({"num_experts_per_token": 6}, "num_experts_per_token is 6; .* at most num_experts 5"),
        ({"sliding_window": 0}, "sliding_window is 0; it must be at least 1, or None"),
        ({"rope_theta": 0.0}, r"rope_theta is 0\.0; it must be above 0"),
        ({"model_type": "llama"}, "model_type is 'llama'; it must be one of 'mixtral', "),
        ({"eos_token_id": (3, 48)}, "token id 48 is outside the vocabulary of 48"),
        ({"bos_token_id": -1}, "token id -1 is outside"),
    ],
)
def test_impossible_values(
    tiny: Callable[..., MoEConfig], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(MoEError, match=message) as caught:
        tiny(**changes)
    assert isinstance(caught.value, ConfigError) and isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


def test_unknown_and_missing_keys() -> None:
    with pytest.raises(ConfigError, match="unknown key 'hidden_sise'; did you mean 'hidden_size'"):
        MoEConfig.from_dict({"hidden_sise": 3})
    with pytest.raises(ConfigError, match="missing vocab_size"):
        MoEConfig.from_dict({"hidden_size": 3})
