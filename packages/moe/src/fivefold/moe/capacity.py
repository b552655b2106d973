"""How many tokens an expert takes, and which of too many it keeps.

With a capacity, no expert of a rank gets more rows than a known number, whatever the router says:
the busiest rank then bounds neither time nor memory. The copies beyond it are dropped: the token
goes on without that expert (GShard, arXiv 2006.16668, section 2.2; 2504.14960, section 3.3).

Legend: B sequences, S tokens of a sequence here, L tokens of a whole sequence, K experts per token,
E experts.
"""

import torch
from torch import Tensor, nn

from fivefold.moe.capacity_config import CapacityConfig


class WholeSequences(nn.Module):
    """What a rank knows of the sequences that it holds a part of; here, all of them.

    The seam of full-sequence dropping: a style that splits sequences swaps it for one that asks the
    ranks that share them.

    Attributes:
        num_parts: ranks that share each sequence.
    """

    num_parts = 1

    def gather(self, x_bsk: Tensor) -> Tensor:
        """Values of the tokens here (B, S, K) to those of the whole sequences (B, L, K)."""
        return x_bsk

    def take(self, x_blk: Tensor) -> Tensor:
        """Values of the whole sequences (B, L, K) to those of the tokens here (B, S, K)."""
        return x_blk


class Capacity(nn.Module):
    """Marks the copies that their experts take.

    Args:
        config: how many, and which.
        num_experts: E.

    Attributes:
        sequences: seam; how a rank knows the sequences of which it holds a part.
    """

    def __init__(self, config: CapacityConfig, num_experts: int):
        super().__init__()
        self.config, self.num_experts = config, num_experts
        self.sequences = WholeSequences()

    @torch.no_grad()
    def forward(self, experts_bsk: Tensor, weights_bsk: Tensor) -> Tensor:
        """Which copies are taken: experts and weights (B, S, K) to booleans (B, S, K)."""
        if self.config.factor is None:
            return torch.ones_like(experts_bsk, dtype=torch.bool)
        if self.config.among == "rank":
            pool = (1, -1, experts_bsk.shape[-1])
            return self._kept(experts_bsk.view(pool), weights_bsk.reshape(pool)).view_as(
                experts_bsk
            )
        gather = self.sequences.gather
        return self.sequences.take(self._kept(gather(experts_bsk), gather(weights_bsk)))

    def most_rows(self, num_sequences: int, length: int, num_experts_per_token: int) -> int:
        """Copies for each expert that a rank has at most, whatever the routing.

        Args:
            num_sequences: B.
            length: S.
            num_experts_per_token: K.
        """
        if self.config.among == "rank":
            return self.config.rows(num_sequences * length, num_experts_per_token, self.num_experts)
        whole = length * self.sequences.num_parts
        of_sequence = self.config.rows(whole, num_experts_per_token, self.num_experts)
        return num_sequences * min(length, of_sequence)

    def _kept(self, experts_ptk: Tensor, weights_ptk: Tensor) -> Tensor:
        """The same for P pools of T tokens, in the order of their positions."""
        num_pools, num_tokens, num_copies = experts_ptk.shape
        capacity = self.config.rows(num_tokens, num_copies, self.num_experts)
        groups = experts_ptk.flatten(1)
        pools = torch.arange(num_pools, device=groups.device).unsqueeze(1)
        groups = (groups + pools * self.num_experts).flatten()
        order = self._preference(weights_ptk)
        by_group = groups[order].sort(stable=True)
        order, groups = order[by_group.indices], by_group.values
        kept = torch.empty_like(groups, dtype=torch.bool)
        kept[order] = _place_in_run(groups) < capacity
        return kept.view(experts_ptk.shape)

    def _preference(self, weights_ptk: Tensor) -> Tensor:
        """All copies, the most wanted first; a token's copies go to different experts."""
        if self.config.keep == "position":
            return torch.arange(weights_ptk.numel(), device=weights_ptk.device)
        return weights_ptk.flatten().sort(descending=True, stable=True).indices


def _place_in_run(sorted_values: Tensor) -> Tensor:
    """How many equal values stand before each one: [3, 3, 5, 5, 5] to [0, 1, 0, 1, 2]."""
    places = torch.arange(len(sorted_values), device=sorted_values.device)
    return places - torch.searchsorted(sorted_values, sorted_values)
