"""Tiny models, and transformers' Mixtral as the oracle."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral import modeling_mixtral
from transformers.utils import logging

from fivefold.moe import MoEConfig, MoEForCausalLM
from fivefold.moe.cli import main
from fivefold.moe.hf import from_hf

from .runs import write_run

logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def tiny() -> Callable[..., MoEConfig]:
    """Makes small configurations; weights are large so that routing is decided clearly."""

    def make(**changes: Any) -> MoEConfig:
        sizes: dict[str, Any] = {
            "vocab_size": 48,
            "hidden_size": 32,
            "num_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "expert_intermediate_size": 24,
            "num_experts": 5,
            "num_experts_per_token": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.3,
        }
        return MoEConfig(**(sizes | changes))

    return make


@pytest.fixture
def oracle(tmp_path: Path) -> Callable[..., tuple[MoEForCausalLM, Any]]:
    """Makes our model and transformers' with the same random weights, in eval mode."""

    def make(config: MoEConfig, dtype: torch.dtype = torch.float32) -> tuple[MoEForCausalLM, Any]:
        # Its grouped kernel has no float64; "eager" is the loop over experts.
        described = MixtralConfig(
            **config.to_hf(), attn_implementation="sdpa", experts_implementation="eager"
        )
        theirs = MixtralForCausalLM(described).to(dtype).eval()
        theirs.save_pretrained(tmp_path / "oracle")
        ours = MoEForCausalLM(config).to(dtype).eval()
        state = load_file(tmp_path / "oracle" / "model.safetensors")
        ours.load_state_dict(from_hf(config, state), strict=not config.tie_word_embeddings)
        return ours, theirs

    return make


@pytest.fixture
def exact_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers rounds norms and routing to float32 even in a float64 model; this does not."""

    def norm(self: Any, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x * scale

    def route(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(x.reshape(-1, self.hidden_dim), self.weight)
        weights, experts = logits.softmax(-1).topk(self.top_k)
        return logits, weights / weights.sum(-1, keepdim=True), experts

    monkeypatch.setattr(modeling_mixtral.MixtralRMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_mixtral.MixtralTopKRouter, "forward", route)


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """Fills fresh memory with NaN, so that a result which reads it shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The TOML file of a tiny run, beside its text; see ``runs``."""
    return write_run(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def finished_run(run_file: Path) -> Path:
    """The folder of that run after its six steps on 8 ranks; only to be read."""
    folder = run_file.parent / "finished"
    assert main(["train", "--config", str(run_file), "--run", str(folder), "--nproc", "8"]) == 0
    return folder


@pytest.fixture(scope="session")
def exported_run(finished_run: Path) -> Path:
    """That run's model in Hugging Face form; only to be read."""
    folder = finished_run.parent / "model"
    assert main(["export", "--run", str(finished_run), "--output", str(folder)]) == 0
    return folder
