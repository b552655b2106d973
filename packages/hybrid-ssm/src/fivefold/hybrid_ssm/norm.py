"""Root-mean-square norms on the fused op.

A decoded token is so little work that calling the op costs more than its few passes over memory
save; such inputs go through torch's own functions, which compute the same.

Legend: G groups.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fivefold.kernels import rms_norm

_FEW = 1 << 14
"""Values below which torch's own functions are as fast."""


def is_small(x: Tensor) -> bool:
    """Whether ``x`` is a decoded token or so on a CPU, with no gradient and no compiler to see."""
    return (
        x.numel() < _FEW
        and x.dtype in (torch.float32, torch.float64)
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm``, computed in one pass over memory and rounded once."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dim of (..., H)."""
        if is_small(x):
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
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
        if is_small(y):
            gated = (F.silu(gate) * y).unflatten(-1, (-1, self.group_size))
            return F.rms_norm(gated, (self.group_size,), None, self.eps).flatten(-2) * self.weight
        return rms_norm(
            y, self.weight.shape, self.weight, self.eps, gate=gate, group_size=self.group_size
        )
