"""transformers' models as oracles, with their traps disarmed.

Three are known of version 5.23: Nemotron-H's mixers ignore ``time_step_limit`` and put a floor of
0.001 under the time step in prefill and none in decoding; freshly drawn weights make the scan so
small that the norm's epsilon swallows it, so that any scan passes; and a cache of a model without
attention raises.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    Mamba2Config,
    Mamba2ForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
)
from transformers.utils import logging

from fivefold.hybrid_ssm import HybridConfig

logging.disable_progress_bar()


def their_model(config: HybridConfig, dtype: torch.dtype = torch.float32) -> Any:
    """Transformers' model of a configuration, in eval mode, its limits of the time step ours."""
    if config.model_type == "mamba2":
        theirs: Any = Mamba2ForCausalLM(Mamba2Config.from_dict(config.to_hf()))
    else:
        described = NemotronHConfig.from_dict(config.to_hf())
        described._attn_implementation = "sdpa"
        described._experts_implementation = "eager"
        theirs = NemotronHForCausalLM(described)
    disarm(theirs, config)
    return theirs.to(dtype).eval()


def disarm(theirs: nn.Module, config: HybridConfig) -> None:
    """Give every Mamba mixer the limits of the configuration."""
    for module in theirs.modules():
        if hasattr(module, "A_log"):
            module.time_step_limit = config.dt_limit


@torch.no_grad()
def liven(theirs: nn.Module, seed: int = 3) -> None:
    """Weights that make every part of a model matter to its logits, which are then about 4."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: torch.Tensor, low: float, high: float) -> None:
        drawn = torch.empty(tensor.shape).uniform_(low, high, generator=generator)
        tensor.copy_(drawn)

    for name, tensor in [*theirs.named_parameters(), *theirs.named_buffers()]:
        last = name.rpartition(".")[2]
        if last == "A_log":
            uniform(tensor, -1.5, 1.5)
        elif last == "dt_bias":
            uniform(tensor, -3.0, 1.0)
        elif last == "e_score_correction_bias":
            uniform(tensor, -0.3, 0.3)
        elif last == "D" or "norm" in name:
            uniform(tensor, 0.5, 1.5)
        elif "conv1d" in name or last == "bias":
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)
        elif "embed" in name and not theirs.config.tie_word_embeddings:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        else:
            scale = tensor.shape[-1] ** -0.5
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)


def save_theirs(theirs: Any, folder: Path) -> None:
    """Write transformers' model as transformers does."""
    theirs.save_pretrained(folder)
