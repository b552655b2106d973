"""Which experts each token goes to, with what weight, and the losses that keep them balanced.

Legend: B sequences, S tokens of a sequence here, N = B * S, E experts, K experts per token,
H hidden width.
"""

import torch
from torch import Tensor, nn

from fivefold.parallel_core.losses import SideOutputs


class Router(nn.Module):
    """Softmax over all experts, the ``num_experts_per_token`` best, weights scaled to sum to 1.

    Scores are computed in float32 or wider. Of equally probable experts the one with the lower
    index is chosen.

    In training it adds to ``side``, as sums over what this rank holds:

    - ``aux_loss``: ``aux_loss_coef * E / (K * L**2) * sum_e(count_e * sum_t(prob_te))`` for every
      sequence of L tokens (Switch Transformer, arXiv 2101.03961, equations 4 to 6, per
      sequence). A balanced routing gives ``aux_loss_coef`` per sequence and layer. Counts and L
      are of the whole sequence, the probabilities are this rank's.
    - ``z_loss``: ``z_loss_coef / L * sum_t(logsumexp(logits_t)**2)`` (ST-MoE, arXiv 2202.08906,
      equation 5).
    - ``load.<layer>``: tokens per expert (E,).

    ``initializer_range`` is the standard deviation of the first weights.

    Attributes:
        weight: (E, H).
        sequence_total: seam. Identity where a rank holds whole sequences; a style that splits
            sequences swaps it for a sum over the ranks that share one. Integers (B, E + 1).
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        num_experts_per_token: int,
        side: SideOutputs,
        layer: int = 0,
        aux_loss_coef: float = 0.0,
        z_loss_coef: float = 0.0,
        initializer_range: float = 0.02,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.num_experts_per_token = num_experts_per_token
        self.side = side
        self.layer = layer
        self.aux_loss_coef = aux_loss_coef
        self.z_loss_coef = z_loss_coef
        self.sequence_total: nn.Module = nn.Identity()
        self.initializer_range = initializer_range
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, with torch's global generator; nothing happens on meta."""
        nn.init.normal_(self.weight, std=self.initializer_range)

    def forward(self, x_bsh: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (B, S, H) to gate weights (N, K), in x's dtype, and experts (N, K)."""
        dtype = torch.promote_types(x_bsh.dtype, torch.float32)
        logits_bse = x_bsh.to(dtype) @ self.weight.to(dtype).T
        probs_bse = logits_bse.softmax(dim=-1)
        # A stable sort rather than topk, which leaves the order of equal values open.
        order_bse = probs_bse.detach().sort(dim=-1, descending=True, stable=True).indices
        experts_bsk = order_bse[..., : self.num_experts_per_token]
        weights_bsk = probs_bse.gather(-1, experts_bsk)
        weights_bsk = weights_bsk / weights_bsk.sum(dim=-1, keepdim=True)
        if self.training:
            weights_bsk = self._add_side_outputs(logits_bse, probs_bse, experts_bsk, weights_bsk)
        return weights_bsk.to(x_bsh.dtype).flatten(0, 1), experts_bsk.flatten(0, 1)

    def _add_side_outputs(
        self, logits_bse: Tensor, probs_bse: Tensor, experts_bsk: Tensor, weights_bsk: Tensor
    ) -> Tensor:
        """Count the load and tie the losses to the weights, which every token's output uses."""
        counts_be = _count(experts_bsk.flatten(1), probs_bse.shape[-1])
        self.side.count(f"load.{self.layer}", counts_be.sum(dim=0))
        if self.aux_loss_coef == 0 and self.z_loss_coef == 0:
            return weights_bsk
        length_b1 = torch.full_like(counts_be[:, :1], probs_bse.shape[1])
        totals = self.sequence_total(torch.cat((counts_be, length_b1), dim=1))
        total_be, length_b1 = totals[:, :-1], totals[:, -1:]
        if self.aux_loss_coef > 0:
            aux = self._balance_loss(probs_bse, total_be, length_b1)
            weights_bsk = self.side.loss("aux_loss", aux, weights_bsk)
        if self.z_loss_coef > 0:
            squares_bs = logits_bse.logsumexp(dim=-1).square()
            z = self.z_loss_coef * (squares_bs / length_b1).sum()
            weights_bsk = self.side.loss("z_loss", z, weights_bsk)
        return weights_bsk

    def _balance_loss(self, probs_bse: Tensor, total_be: Tensor, length_b1: Tensor) -> Tensor:
        """This rank's part of the balance loss, from the counts of whole sequences."""
        num_experts = probs_bse.shape[-1]
        length_b1 = length_b1.to(probs_bse.dtype)
        scale_b1 = num_experts / (self.num_experts_per_token * length_b1.square())
        return self.aux_loss_coef * (scale_b1 * total_be * probs_bse.sum(dim=1)).sum()


def _count(experts_bn: Tensor, num_experts: int) -> Tensor:
    """How often each expert occurs in each row: (B, n) to (B, E)."""
    counts_be = experts_bn.new_zeros(experts_bn.shape[0], num_experts)
    return counts_be.scatter_add_(1, experts_bn, torch.ones_like(experts_bn))
