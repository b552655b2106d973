"""Root-mean-square norms on the fused op.

Legend: G groups.
"""

import torch
from torch import Tensor, nn

from fivefold.kernels import rms_norm


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm``, computed in one pass over memory and rounded once."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dim of (..., H)."""
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)


class GatedNorm(nn.Module):
    """``rms_norm(y * silu(z)) * weight``, each group of channels normalised by itself.

    The number of channels is what the weight has, so a rank may hold some of the groups.

    Args:
        width: channels of all groups.
        num_groups: G.
        eps: added to the mean square.
    """

    def __init__(self, width: int, num_groups: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.group_size = width // num_groups
        self.eps = eps

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        """Both (..., channels) to the same shape."""
        return rms_norm(
            y, self.weight.shape, self.weight, self.eps, gate=gate, group_size=self.group_size
        )
