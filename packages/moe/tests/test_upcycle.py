"""A mixture of experts starts as the dense model that it was made of."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fivefold.moe import MoEForCausalLM
from fivefold.moe.cli import main
from fivefold.moe.errors import MoEConfigError
from fivefold.moe.replay import record_routing
from fivefold.moe.upcycle import TARGETS, UpcycleConfig, upcycle, upcycled_config

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
}


def dense(kind: str, folder: Path, **changes: Any) -> Any:
    """A dense model of transformers, with weights that matter, in float64."""
    config = AutoConfig.for_model(kind, **SIZES | changes)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("granularity", [1, 4])
def test_the_mixture_starts_as_the_dense_model(kind: str, granularity: int, tmp_path: Path) -> None:
    theirs = dense(kind, tmp_path / "dense")
    config = UpcycleConfig(copies=4, copies_per_token=2, granularity=granularity, router_std=0.5)
    upcycle(tmp_path / "dense", tmp_path / "mixture", config)
    ours = MoEForCausalLM.from_pretrained(tmp_path / "mixture")
    assert ours.config.num_experts == 4 * granularity
    assert ours.config.num_experts_per_token == 2 * granularity
    assert ours.config.expert_intermediate_size == 48 // granularity
    ids = torch.randint(0, 48, (2, 11))
    # Theirs rounds its norms to float32.
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-5)
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "mixture", experts_implementation="eager"
    )
    torch.testing.assert_close(again(ids).logits, ours(ids), rtol=1e-4, atol=1e-5)


def test_a_token_uses_whole_copies_and_different_ones_are_used(tmp_path: Path) -> None:
    dense("llama", tmp_path / "dense")
    config = UpcycleConfig(copies=4, copies_per_token=1, granularity=8, router_std=0.5)
    upcycle(tmp_path / "dense", tmp_path / "mixture", config)
    ours = MoEForCausalLM.from_pretrained(tmp_path / "mixture")
    with record_routing(ours) as record:
        ours(torch.randint(0, 48, (2, 11)))
    for (chosen,) in record.choices.values():
        copies = (chosen // 8).unique(dim=-1)
        assert ((chosen // 8) == (chosen // 8)[..., :1]).all()
        assert (chosen.sort(-1).values % 8 == torch.arange(8)).all()
        assert len(copies.unique()) > 1


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense("qwen3", tmp_path / "dense", tie_word_embeddings=True)
    words = ["upcycle", "--model", str(tmp_path / "dense"), "--output", str(tmp_path / "mixture")]
    assert main([*words, "--copies", "3", "--copies-per-token", "1", "--granularity", "2"]) == 0
    told = capsys.readouterr().out
    assert "a Qwen3MoeForCausalLM: 6 experts of width 24, 2 of them for a token to" in told
    assert MoEForCausalLM.from_pretrained(tmp_path / "mixture").config.tie_word_embeddings
    assert main([*words, "--granularity", "5"]) == 1
    told = capsys.readouterr().err
    assert "intermediate_size 48 of the dense model cannot be cut into granularity=5" in told


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"copies": 0, "copies_per_token": 1}, "copies is 0; it must be at least 1"),
        ({"copies": 2, "copies_per_token": 3}, "copies_per_token is 3; it must be from 1 to cop"),
        ({"copies": 2, "copies_per_token": 1, "granularity": 0}, "granularity is 0"),
        (
            {"copies": 2, "copies_per_token": 1, "router_std": 0.0},
            r"router_std is 0\.0; .* above 0",
        ),
    ],
)
def test_impossible_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(MoEConfigError, match=message):
        UpcycleConfig(**values)


def test_other_models_are_named() -> None:
    config = UpcycleConfig(copies=2, copies_per_token=1)
    with pytest.raises(MoEConfigError, match="type 'gpt2' cannot be upcycled; legal: llama, mist"):
        upcycled_config({"model_type": "gpt2"}, config)
