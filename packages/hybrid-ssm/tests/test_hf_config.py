"""Dialects of ``config.json``."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from transformers import Mamba2Config, NemotronHConfig, PreTrainedConfig

from fivefold.hybrid_ssm import HybridConfig
from fivefold.hybrid_ssm.errors import HybridConfigError

from .released import RELEASED

BASE: dict[str, Any] = {
    "model_type": "nemotron_h",
    "hidden_size": 64,
    "hybrid_override_pattern": "M-M*",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "intermediate_size": 96,
}
Make = Callable[..., HybridConfig]


def read(**changes: Any) -> HybridConfig:
    given = {key: value for key, value in (BASE | changes).items() if value is not None}
    return HybridConfig.from_hf(given)


def test_width_is_heads_times_head_width_not_expand() -> None:
    config = read(expand=2, mamba_num_heads=6, n_groups=2)
    assert config.mamba_width == 96


def test_query_width_is_its_own() -> None:
    assert (read().head_dim, read().hidden_size // read().num_attention_heads) == (24, 16)


@pytest.mark.parametrize("key", ["head_dim", "attention_head_dim"])
def test_either_name_of_the_head_width(key: str) -> None:
    assert read(**{"head_dim": None, key: 48}).head_dim == 48
    assert read(head_dim=None).head_dim == 128


def test_positions_are_not_read() -> None:
    assert read(rope_theta=10000.0, partial_rotary_factor=0.5) == read()


def test_epsilon_has_one_key() -> None:
    config = read(layer_norm_epsilon=1e-6, rms_norm_eps=1e-3, norm_eps=1e-2)
    assert config.norm_eps == 1e-6


@pytest.mark.parametrize(
    "layers",
    [
        {"hybrid_override_pattern": "M-M*"},
        {
            "hybrid_override_pattern": None,
            "layers_block_type": ["mamba", "mlp", "mamba", "attention"],
        },
        {
            "hybrid_override_pattern": None,
            "layers_block_type": ["linear_attention", "mlp", "linear_attention", "full_attention"],
        },
        {"layer_types": ["linear_attention", "mlp", "linear_attention", "full_attention"]},
        {"hybrid_override_pattern": "M-|M*", "num_hidden_layers": 4},
        {"hybrid_override_pattern": "M-M*/*E"},
    ],
)
def test_every_spelling_of_the_layers(layers: dict[str, Any]) -> None:
    assert read(**layers).pattern == "M-M*"


def test_depths_of_prediction() -> None:
    experts = {"n_routed_experts": 4, "num_nextn_predict_layers": 1}
    for spelling in (
        {"hybrid_override_pattern": "M-M*/**E"},
        {"mtp_hybrid_override_pattern": "**E"},
        {"mtp_layers_block_type": ["attention", "full_attention", "moe"]},
    ):
        assert read(**experts, **spelling).mtp_pattern == "**E"
    assert read(**experts).mtp_pattern == "*E"


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("[0.0, Infinity]", (0.0, None)),
        ("[0.0, 1e308]", (0.0, None)),
        ('[0.0, {"__float__": "Infinity"}]', (0.0, None)),
        ('[0.0, "Infinity"]', (0.0, None)),
        ("null", (0.0, None)),
        ("[0.001, 0.1]", (0.001, 0.1)),
        ("[0, 3]", (0.0, 3.0)),
    ],
)
def test_every_spelling_of_infinity(limit: str, expected: tuple[float, float | None]) -> None:
    text = json.dumps(BASE)[:-1] + f', "time_step_limit": {limit}}}'
    assert HybridConfig.from_hf(json.loads(text)).time_step_limit == expected
    assert read().time_step_limit == (0.0, None)


def test_older_names() -> None:
    old = {"mamba_n_groups": 4, "mamba_d_conv": 3, "mamba_chunk_size": 32, "mamba_dt_limit": [0, 1]}
    config = read(**old, mamba_conv_bias=False, mamba_dt_min=0.01, mamba_dt_max=0.2)
    assert (config.num_groups, config.conv_width, config.chunk_size) == (4, 3, 32)
    assert (config.time_step_limit, config.use_conv_bias) == ((0.0, 1.0), False)
    assert (config.time_step_min, config.time_step_max) == (0.01, 0.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, "model_type is 'mixtral' .* 'nemotron_h', 'mamba2'"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act is 'silu' .* supported: 'relu2'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"sliding_window": 128}, "sliding_window is 128"),
        (
            {"layer_types": ["mamba"]},
            "says two things of its layers: hybrid.* M-M\\*, layer_types M",
        ),
        ({"num_hidden_layers": 5}, r"num_hidden_layers is 5 .* has 4 layers: M-M\*"),
        ({"time_step_limit": [1]}, r"time_step_limit is \[1\] .* a pair"),
        ({"time_step_limit": [0, "x"]}, "time_step_limit has 'x'"),
        ({"time_step_limit": [0, float("nan")]}, "time_step_limit has nan"),
        ({"hybrid_override_pattern": "M?"}, "layer 1 of pattern 'M\\?' is '\\?'"),
    ],
)
def test_what_is_not_computed_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(HybridConfigError, match=message):
        read(**changes)


@pytest.mark.parametrize("name", RELEASED)
def test_released_configurations_survive_the_way_out_and_in(name: str) -> None:
    config = HybridConfig.from_hf(RELEASED[name][0])
    assert HybridConfig.from_hf(json.loads(json.dumps(config.to_hf(), allow_nan=False))) == config


@pytest.mark.parametrize(
    "changes",
    [{}, {"eos_token_id": (1, 2), "time_step_limit": (0.01, 0.5), "latent_size": 16}],
)
def test_transformers_reads_and_writes_the_same(changes: dict[str, Any], tiny: Make) -> None:
    config = tiny(**changes)
    theirs = NemotronHConfig.from_dict(config.to_hf())
    assert theirs.hybrid_override_pattern == config.pattern
    for text in (theirs.to_json_string(), theirs.to_json_string(use_diff=False)):
        assert HybridConfig.from_hf(json.loads(text)) == config


def test_mamba2_is_the_same_in_transformers(tiny: Make) -> None:
    config = tiny(model_type="mamba2", pattern="MMM", pad_token_id=1, time_step_limit=(0.0, 2.0))
    theirs = Mamba2Config.from_dict(config.to_hf())
    expected = tiny(
        model_type="mamba2",
        pattern="MMM",
        pad_token_id=1,
        time_step_limit=(0.0, 2.0),
    )
    kept = {"num_mamba_heads", "mamba_head_dim", "state_size", "num_groups", "time_step_limit"}
    found = HybridConfig.from_hf(json.loads(theirs.to_json_string(use_diff=False)))
    assert {k: getattr(found, k) for k in kept} == {k: getattr(expected, k) for k in kept}
    assert (found.pattern, found.pad_token_id) == ("MMM", 1)


class _FirstRelease(PreTrainedConfig):
    """How the remote code of the first releases holds its layers: the names are computed."""

    model_type = "nemotron_h_first"

    def __init__(
        self, hybrid_override_pattern: str = "", num_hidden_layers: int = 0, **kwargs: Any
    ):
        self.hybrid_override_pattern = hybrid_override_pattern
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**kwargs)

    @property
    def layers_block_type(self) -> list[str]:
        names = {"M": "mamba", "*": "attention"}
        return [names.get(letter, "mlp") for letter in self.hybrid_override_pattern]


def test_remote_code_of_the_first_releases_reads_what_is_written(tiny: Make) -> None:
    written = tiny(pattern="M-M*").to_hf()
    theirs = _FirstRelease(**written)
    assert theirs.layers_block_type == ["mamba", "mlp", "mamba", "attention"]
    assert theirs.num_hidden_layers == len(theirs.hybrid_override_pattern) == 4
    # The other spelling would be fatal there.
    with pytest.raises(AttributeError, match="layers_block_type"):
        _FirstRelease(**written, layers_block_type=["mamba", "mlp", "mamba", "attention"])
