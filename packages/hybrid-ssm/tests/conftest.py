"""Tiny models, and transformers' Nemotron-H as the oracle."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fivefold.hybrid_ssm import HybridConfig, HybridForCausalLM
from fivefold.hybrid_ssm.cli import main

from .oracles import liven, save_theirs, their_model
from .runs import write_run


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def tiny() -> Callable[..., HybridConfig]:
    """Makes small configurations with every kind of layer."""
    return tiny_config


def tiny_config(**changes: Any) -> HybridConfig:
    """The configuration of the research notes' tiny oracle, with changes."""
    sizes: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 64,
        "pattern": "M-M*-ME*EM-",
        "num_mamba_heads": 8,
        "mamba_head_dim": 16,
        "state_size": 16,
        "num_groups": 2,
        "chunk_size": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "num_experts": 4,
        "num_experts_per_token": 2,
        "expert_intermediate_size": 24,
        "shared_intermediate_size": 40,
    }
    return HybridConfig(**(sizes | changes))


@pytest.fixture
def oracle(tmp_path: Path) -> Callable[..., tuple[HybridForCausalLM, Any]]:
    """Makes our model and transformers' with the same live weights, in eval mode."""

    def make(
        config: HybridConfig, dtype: torch.dtype = torch.float32
    ) -> tuple[HybridForCausalLM, Any]:
        theirs = their_model(config, dtype)
        liven(theirs)
        folder = tmp_path / "oracle"
        save_theirs(theirs, folder)
        return HybridForCausalLM.from_pretrained(folder, dtype=dtype), theirs

    return make


@pytest.fixture(scope="session")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The TOML file of a tiny run, beside its text; see ``runs``."""
    return write_run(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def finished_run(run_file: Path) -> Path:
    """The folder of that run after its six steps on 4 ranks; only to be read."""
    folder = run_file.parent / "finished"
    assert main(["train", "--config", str(run_file), "--run", str(folder), "--nproc", "4"]) == 0
    return folder


@pytest.fixture(scope="session")
def exported_run(finished_run: Path) -> Path:
    """That run's model in Hugging Face form; only to be read."""
    folder = finished_run.parent / "model"
    assert main(["export", "--run", str(finished_run), "--output", str(folder)]) == 0
    return folder
