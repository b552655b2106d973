"""Which experts each token goes to, with what weight, and the losses that keep them balanced.

Legend: B sequences, S tokens of a sequence here, N = B * S, E experts, K experts per token,
H hidden width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fivefold.moe.replay import RoutingRecord
from fivefold.moe.router_config import RouterConfig
from fivefold.moe.routing import choose, score, weigh
from fivefold.parallel_core.losses import SideOutputs


class Router(nn.Module):
    """Scores every expert for every token, and gives each token the best ones and their weights.

    Of equally good experts the one with the lower index is chosen.

    In training it adds to ``side``, as sums over what this rank holds:

    - ``aux_loss``: ``aux_loss_coef * E / (K * L**2) * sum_e(count_e * sum_t(share_te))`` for every
      sequence of L tokens (Switch Transformer, arXiv 2101.03961, equations 4 to 6, per sequence),
      where a token's shares are its scores scaled to sum to 1 (DeepSeek-V3, 2412.19437, equations
      17 to 20). A balanced routing gives ``aux_loss_coef`` per sequence and layer. Counts and L
      are of the whole sequence, the shares are this rank's.
    - ``global_loss``: the same with the counts of all sequences of the global batch of the step
      before (2501.11873, with counts that need no waiting for the other microbatches and so do not
      depend on how many there are), and nothing in the first step.
    - ``z_loss``: ``z_loss_coef / L * sum_t(logsumexp(logits_t)**2)`` (ST-MoE, arXiv 2202.08906,
      equation 5).
    - ``load.<layer>``: tokens per expert (E,), which ``after_step`` wants back, summed over the
      ranks.

    Args:
        num_experts: E.
        hidden_size: H.
        num_experts_per_token: K.
        side: where losses and counts go.
        layer: index under which the load is counted.
        config: how experts are chosen.
        initializer_range: standard deviation of the first weights.

    Attributes:
        weight: (E, H).
        bias: what is added to the scores for the choice, float32 (E,); None without.
        previous_load: share of each expert in the step before, float32 (E,), 0 in the first; None
            where no loss needs it.
        sequence_total: seam. Identity where a rank holds whole sequences; a style that splits
            sequences swaps it for a sum over the ranks that share one. Integers (B, E + 1).
        record: where the choices are written down or taken from; None for neither.
    """

    bias: Tensor | None
    previous_load: Tensor | None

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        num_experts_per_token: int,
        side: SideOutputs,
        layer: int = 0,
        config: RouterConfig | None = None,
        initializer_range: float = 0.02,
    ):
        super().__init__()
        self.config = RouterConfig() if config is None else config
        self.config.check(num_experts, num_experts_per_token)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.num_experts_per_token = num_experts_per_token
        self.side = side
        self.layer = layer
        self.sequence_total: nn.Module = nn.Identity()
        self.record: RoutingRecord | None = None
        self.initializer_range = initializer_range
        zeros = torch.zeros(num_experts, dtype=torch.float32)
        self.register_buffer("bias", zeros if self.config.expert_bias else None)
        needed = self.config.global_loss_coef > 0
        self.register_buffer("previous_load", zeros.clone() if needed else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, with torch's global generator; nothing happens on meta."""
        nn.init.normal_(self.weight, std=self.initializer_range)
        for buffer in (self.bias, self.previous_load):
            if buffer is not None:
                nn.init.zeros_(buffer)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        # A step of the bias is far below what narrower types tell apart.
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, kept in before.items():
            after = self.get_buffer(name)
            if after.dtype != kept.dtype:
                setattr(self, name, kept.to(after.device))
        return self

    def forward(self, x_bsh: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (B, S, H) to gate weights (N, K), in x's dtype, and experts (N, K)."""
        logits_bse = self._logits(x_bsh)
        scores_bse = score(logits_bse, self.config)
        experts_bsk = choose(
            scores_bse, self.choice_bias(), self.config, self.num_experts_per_token
        )
        if self.record is not None:
            experts_bsk = self.record.pass_through(self.layer, experts_bsk)
        weights_bsk = weigh(scores_bse, experts_bsk, self.config)
        if self.training:
            weights_bsk = self._add_side_outputs(logits_bse, scores_bse, experts_bsk, weights_bsk)
        return weights_bsk.to(x_bsh.dtype).flatten(0, 1), experts_bsk.flatten(0, 1)

    def choice_bias(self) -> Tensor | None:
        """What is added to the scores for the choice (E,); None for nothing."""
        return self.bias

    @torch.no_grad()
    def after_step(self, load_e: Tensor) -> None:
        """Learn from the load of a whole step: move the bias, and keep the shares.

        The bias of an expert with less than its share of the tokens rises by ``bias_rate``, with
        more it falls (arXiv 2408.15664, algorithm 1).

        Args:
            load_e: ``load.<layer>`` summed over all microbatches and ranks (E,).
        """
        load_e = load_e.double()
        if self.bias is not None:
            lack_e = load_e.mean() - load_e
            self.bias += self.config.bias_rate * lack_e.sign().to(self.bias)
        if self.previous_load is not None:
            self.previous_load.copy_(load_e / load_e.sum())

    def _logits(self, x_bsh: Tensor) -> Tensor:
        dtype = torch.promote_types(x_bsh.dtype, getattr(torch, self.config.dtype))
        x_bsh = x_bsh.to(dtype)
        if self.training and self.config.jitter > 0:
            noise = torch.empty_like(x_bsh).uniform_(-self.config.jitter, self.config.jitter)
            x_bsh = x_bsh * (1 + noise)
        return x_bsh @ self.weight.to(dtype).T

    def _add_side_outputs(
        self, logits_bse: Tensor, scores_bse: Tensor, experts_bsk: Tensor, weights_bsk: Tensor
    ) -> Tensor:
        """Count the load and tie the losses to the weights, which every token's output uses."""
        counts_be = _count(experts_bsk.flatten(1), scores_bse.shape[-1])
        self.side.count(f"load.{self.layer}", counts_be.sum(dim=0))
        for name, loss in self._losses(logits_bse, scores_bse, counts_be).items():
            weights_bsk = self.side.loss(name, loss, weights_bsk)
        return weights_bsk

    def _losses(
        self, logits_bse: Tensor, scores_bse: Tensor, counts_be: Tensor
    ) -> dict[str, Tensor]:
        """This rank's part of the losses that the configuration asks for."""
        config = self.config
        losses: dict[str, Tensor] = {}
        if not (config.aux_loss_coef or config.global_loss_coef or config.z_loss_coef):
            return losses
        length_b1 = torch.full_like(counts_be[:, :1], scores_bse.shape[1])
        totals = self.sequence_total(torch.cat((counts_be, length_b1), dim=1))
        total_be, length_b1 = totals[:, :-1], totals[:, -1:].to(scores_bse.dtype)
        if config.aux_loss_coef > 0:
            shares_be = total_be / (length_b1 * self.num_experts_per_token)
            aux = self._balance_loss(scores_bse, shares_be, length_b1)
            losses["aux_loss"] = config.aux_loss_coef * aux
        if self.previous_load is not None:
            shares_e = self.previous_load.to(scores_bse.dtype)
            balance = self._balance_loss(scores_bse, shares_e, length_b1)
            losses["global_loss"] = config.global_loss_coef * balance
        if config.z_loss_coef > 0:
            squares_bs = logits_bse.logsumexp(dim=-1).square()
            losses["z_loss"] = config.z_loss_coef * (squares_bs / length_b1).sum()
        return losses

    def _balance_loss(self, scores_bse: Tensor, load: Tensor, length_b1: Tensor) -> Tensor:
        """E times the sum over experts of their share of the load and of the scores."""
        if self.config.score == "sigmoid":
            scores_bse = scores_bse / (scores_bse.sum(dim=-1, keepdim=True) + 1e-20)
        return (scores_bse.shape[-1] / length_b1 * load * scores_bse.sum(dim=1)).sum()


def _count(experts_bn: Tensor, num_experts: int) -> Tensor:
    """How often each expert occurs in each row: (B, n) to (B, E)."""
    counts_be = experts_bn.new_zeros(experts_bn.shape[0], num_experts)
    return counts_be.scatter_add_(1, experts_bn, torch.ones_like(experts_bn))
