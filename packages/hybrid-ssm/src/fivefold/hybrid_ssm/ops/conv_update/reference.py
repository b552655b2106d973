"""The specification of ``conv_update`` in plain PyTorch.

Legend: B batch, K channels, W taps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def conv_update_step(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> Tensor:
    """``state`` to the next one, in place; returns the result (B, K)."""
    inputs_bwk = torch.cat([state, x.unsqueeze(1)], 1)
    state.copy_(inputs_bwk[:, 1:])
    compute = torch.promote_types(x.dtype, torch.float32)
    y_bk = (inputs_bwk.to(compute) * weight.to(compute).mT).sum(1)
    if bias is not None:
        y_bk = y_bk + bias.to(compute)
    return (F.silu(y_bk) if silu else y_bk).to(x.dtype)
