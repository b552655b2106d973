"""Tiny models, and transformers' as the oracle."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.glm4_moe import modeling_glm4_moe
from transformers.models.mixtral import modeling_mixtral
from transformers.models.qwen2_moe import modeling_qwen2_moe
from transformers.models.qwen3_moe import modeling_qwen3_moe
from transformers.utils import logging

from fivefold.moe import MoEConfig, MoEForCausalLM
from fivefold.moe.cli import main
from fivefold.moe.hf import from_hf
from fivefold.moe.router_config import RouterConfig

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
def family(tiny: Callable[..., MoEConfig]) -> Callable[..., MoEConfig]:
    """Makes a small configuration of a family, with all that is its own."""
    own: dict[str, dict[str, Any]] = {
        "mixtral": {},
        "qwen2_moe": {
            "qkv_bias": True,
            "shared_intermediate_size": 40,
            "shared_gate": True,
            "dense_layers": (1,),
            "intermediate_size": 56,
            "router": RouterConfig(normalize=False),
        },
        "qwen3_moe": {
            "qk_norm": True,
            "head_dim": 10,
            "dense_layers": (0, 2),
            "intermediate_size": 56,
        },
        "glm4_moe": {
            "qk_norm": True,
            "qkv_bias": True,
            "rotary_fraction": 0.5,
            "shared_intermediate_size": 48,
            "dense_layers": (0,),
            "intermediate_size": 56,
            "router": RouterConfig(
                score="sigmoid", expert_bias=True, scale=2.5, num_groups=4, groups_per_token=2
            ),
        },
    }

    def make(name: str, **changes: Any) -> MoEConfig:
        sizes = {"num_layers": 4, "num_experts": 8, "num_experts_per_token": 3}
        return tiny(**(sizes | own[name] | changes), model_type=name)

    return make


@pytest.fixture
def oracle(tmp_path: Path) -> Callable[..., tuple[MoEForCausalLM, Any]]:
    """Makes our model and transformers' with the same random weights, in eval mode."""

    def make(config: MoEConfig, dtype: torch.dtype = torch.float32) -> tuple[MoEForCausalLM, Any]:
        # Its grouped kernel has no float64; "eager" is the loop over experts.
        described = AutoConfig.for_model(**config.to_hf())
        described._attn_implementation, described._experts_implementation = "sdpa", "eager"
        theirs = AutoModelForCausalLM.from_config(described).to(dtype).eval()
        _draw(theirs)
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
        if getattr(self, "norm_topk_prob", True):
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights, experts

    def route_by_sigmoid(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(x.reshape(-1, self.hidden_dim), self.weight)
        scores = logits.sigmoid()
        worth = (scores + self.e_score_correction_bias).unflatten(-1, (self.num_group, -1))
        best = worth.topk(2).values.sum(-1).topk(self.topk_group).indices
        out = torch.ones(worth.shape[:2], dtype=torch.bool).scatter(-1, best, False)
        worth = worth.masked_fill(out.unsqueeze(-1), -torch.inf).flatten(-2)
        experts = worth.topk(self.top_k).indices
        weights = scores.gather(-1, experts)
        weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights * self.routed_scaling_factor, experts

    monkeypatch.setattr(modeling_mixtral.MixtralRMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_qwen2_moe.Qwen2MoeRMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_qwen3_moe.Qwen3MoeRMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_glm4_moe.Glm4MoeRMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_mixtral.MixtralTopKRouter, "forward", route)
    monkeypatch.setattr(modeling_qwen2_moe.Qwen2MoeTopKRouter, "forward", route)
    monkeypatch.setattr(modeling_qwen3_moe.Qwen3MoeTopKRouter, "forward", route)
    monkeypatch.setattr(modeling_glm4_moe.Glm4MoeTopkRouter, "forward", route_by_sigmoid)


@torch.no_grad()
def _draw(theirs: nn.Module) -> None:
    """Draw all that starts at zero or one too, so that nothing is without effect."""
    for name, parameter in theirs.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 1.5)
        else:
            parameter.normal_(0.0, 0.3)
    for name, buffer in theirs.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.uniform_(-0.3, 0.3)


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
