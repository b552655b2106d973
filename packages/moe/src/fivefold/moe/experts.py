"""The expert networks of one layer, run together as grouped matrix products.

Legend: T rows (token copies), E experts here, F expert width, H hidden width.
"""

import torch
from torch import Tensor, nn

from fivefold.kernels import grouped_mm, swiglu


class Experts(nn.Module):
    """``num_experts`` gated (SwiGLU) feed-forward networks: ``down(silu(gate x) * up x)``.

    All shapes are taken from the parameters, so a rank may hold some of the experts
    (expert parallelism) and a slice of their width (expert tensor parallelism); with a slice the
    output is this rank's part of a sum.

    Args:
        num_experts: E.
        hidden_size: H.
        intermediate_size: F.
        initializer_range: standard deviation of the first weights.

    Attributes:
        gate_up: (E, 2, F, H), gate first. The 2 is a dim of its own so that F can be sliced.
        down: (E, H, F).
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        initializer_range: float = 0.02,
    ):
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2, intermediate_size, hidden_size))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.initializer_range = initializer_range
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, with torch's global generator; nothing happens on meta."""
        nn.init.normal_(self.gate_up, std=self.initializer_range)
        nn.init.normal_(self.down, std=self.initializer_range)

    def forward(self, x_th: Tensor, counts_e: Tensor) -> Tensor:
        """Rows sorted by expert (T, H), and how many each expert gets (E,), to (T, H)."""
        offsets_e = counts_e.cumsum(0).to(torch.int32)
        packed = grouped_mm(x_th, self.gate_up.flatten(1, 2).mT, offs=offsets_e)
        return grouped_mm(swiglu(packed), self.down.mT, offs=offsets_e)
