"""Small models in folders, with weights that all matter, and a text of their tokenizer."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fivefold.hybrid_ssm import HybridConfig, HybridForCausalLM
from fivefold.parallel_core.training.tokenizer import load_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 16,
    "pattern": "M-*-M-E",
    "num_mamba_heads": 4,
    "mamba_head_dim": 8,
    "state_size": 8,
    "num_groups": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_token": 2,
    "expert_intermediate_size": 8,
    "shared_intermediate_size": 8,
    "eos_token_id": 256,
}


@torch.no_grad()
def lively(config: HybridConfig, seed: int = 0) -> HybridForCausalLM:
    """A model whose every part matters to its logits."""
    torch.manual_seed(seed)
    model = HybridForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        if last == "A_log":
            parameter.uniform_(-1.5, 1.5)
        elif last == "dt_bias":
            parameter.uniform_(-3, 1)
        elif last in ("D", "bias") or "norm" in name:
            parameter.uniform_(0.5, 1.5)
        elif parameter.requires_grad:
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model


@pytest.fixture
def make_model() -> Callable[..., HybridForCausalLM]:
    """Makes small models with changes to their configuration."""

    def make(seed: int = 0, **changes: Any) -> HybridForCausalLM:
        return lively(HybridConfig(**(SIZES | changes)), seed)

    return make


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Writes a model and the byte tokenizer into a folder."""

    def write(model: HybridForCausalLM, name: str = "parent") -> Path:
        load_tokenizer("bytes").save(tmp_path / name)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder of short texts."""
    draw = random.Random(0)
    (tmp_path / "text").mkdir()
    for number in range(30):
        words = " ".join(draw.choice(["sun", "moon", "tree", "river"]) for _ in range(40))
        (tmp_path / "text" / f"{number}.txt").write_text(words)
    return tmp_path / "text"
