"""A model of fivefold beside the same files in transformers."""

from pathlib import Path

import torch
from torch import Tensor, nn


@torch.no_grad()
def largest_logit_difference(model: nn.Module, folder: Path, ids: Tensor) -> float:
    """The largest absolute difference of the two models' logits.

    Args:
        model: loaded by fivefold, in eval mode.
        folder: the same model in Hugging Face form.
        ids: (B, S) token ids.
    """
    # Only here: importing transformers takes seconds that training need not wait for.
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    dtype = next(model.parameters()).dtype
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return float((model(ids) - peer(ids).logits).abs().max())
