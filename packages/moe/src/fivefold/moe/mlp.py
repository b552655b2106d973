"""The gated feed-forward network that all tokens share.

Legend: H hidden width, F inner width.
"""

from torch import Tensor, nn

from fivefold.kernels import Linear, swiglu
from fivefold.parallel_core.linear_group import LinearGroup


class GatedMLP(nn.Module):
    """``down(silu(gate x) * up x)``: a dense layer's network, or an expert that every token uses.

    Args:
        hidden_size: H.
        intermediate_size: F; a rank may hold a slice of it.
    """

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_up = LinearGroup(
            {
                "gate_proj": Linear(hidden_size, intermediate_size, bias=False),
                "up_proj": Linear(hidden_size, intermediate_size, bias=False),
            }
        )
        self.down = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states (..., H) to (..., H)."""
        return self.down(swiglu(*self.gate_up(x)))
