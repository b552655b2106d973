"""Nemotron 3's mixture of experts, on fivefold-moe's router, dispatcher and folding.

Every token goes through a shared expert and through some routed ones, which may work in a latent
space of less width. Scores are sigmoids, and a bias that only the choice sees, and that moves
towards balance after every step of training, keeps the load even (arXiv 2408.15664; DeepSeek-V3,
2412.19437, section 2.1.2). Needs the extra ``[moe]``.

Legend: B sequences, S tokens of a sequence here, N = B * S, E experts, K experts per token,
T rows (token copies), F expert width, I width of the experts' input, H hidden width.
"""

import torch
from torch import Tensor, nn

from fivefold.hybrid_ssm.blocks.mlp import MLP
from fivefold.hybrid_ssm.config import HybridConfig
from fivefold.hybrid_ssm.memory import ALONE, Context
from fivefold.kernels import Linear, grouped_mm, relu2
from fivefold.moe.dispatch import TokenDispatcher
from fivefold.moe.dispatchers import folded_dispatcher
from fivefold.moe.router import Router
from fivefold.moe.router_config import RouterConfig
from fivefold.parallel_core.losses import SideOutputs

__all__ = ["ExpertsMixer", "Relu2Experts", "TokenDispatcher", "folded_dispatcher", "make_router"]


def make_router(config: HybridConfig, layer: int, side: SideOutputs) -> Router:
    """``fivefold.moe``'s router as Nemotron 3 has it.

    Its ``bias`` is what files call ``e_score_correction_bias``: a buffer, in float32 or wider
    whatever the model is in, which ``after_step`` moves by ``config.bias_rate``.
    """
    return Router(
        config.num_experts,
        config.hidden_size,
        config.num_experts_per_token,
        side,
        layer,
        RouterConfig(
            score="sigmoid",
            normalize=config.normalise_weights,
            scale=config.routed_scaling_factor,
            num_groups=config.num_expert_groups,
            groups_per_token=config.num_chosen_groups,
            expert_bias=True,
            bias_rate=config.bias_rate,
            aux_loss_coef=config.aux_loss_coef,
            z_loss_coef=config.z_loss_coef,
        ),
        config.initializer_range,
    )


class Relu2Experts(nn.Module):
    """``num_experts`` feed-forward networks without gates: ``down(relu(up x)²)``.

    All shapes are taken from the parameters, so a rank may hold some of the experts
    (expert parallelism) and a slice of their width (expert tensor parallelism); with a slice the
    output is this rank's part of a sum.

    Attributes:
        up: (E, F, I).
        down: (E, I, F).
    """

    def __init__(self, num_experts: int, input_size: int, intermediate_size: int):
        super().__init__()
        self.up = nn.Parameter(torch.empty(num_experts, intermediate_size, input_size))
        self.down = nn.Parameter(torch.empty(num_experts, input_size, intermediate_size))

    def forward(self, x_ti: Tensor, counts_e: Tensor) -> Tensor:
        """Rows sorted by expert (T, I), and how many each expert gets (E,), to (T, I)."""
        offsets_e = counts_e.cumsum(0).to(torch.int32)
        hidden = relu2(grouped_mm(x_ti, self.up.mT, offs=offsets_e))
        return grouped_mm(hidden, self.down.mT, offs=offsets_e)


class ExpertsMixer(nn.Module):
    """Routed experts, in a latent space where there is one, plus a shared expert.

    Attributes:
        router: chooses the experts.
        dispatcher: seam; moves token copies to the experts and back.
        experts: the networks that this rank holds.
        shared: what every token goes through.
        latent_in: hidden width to the experts' input; nothing where they are as wide.
        latent_out: back.
    """

    def __init__(self, config: HybridConfig, layer: int, side: SideOutputs):
        super().__init__()
        hidden, bias = config.hidden_size, config.mlp_bias
        width = hidden if config.latent_size is None else config.latent_size
        self.router = make_router(config, layer, side)
        self.dispatcher = TokenDispatcher(config.num_experts)
        self.experts = Relu2Experts(config.num_experts, width, config.expert_intermediate_size)
        self.shared = MLP(hidden, config.shared_intermediate_size, bias)
        self.latent_in: nn.Module = nn.Identity()
        self.latent_out: nn.Module = nn.Identity()
        if config.latent_size is not None:
            self.latent_in = Linear(hidden, width, bias=bias)
            self.latent_out = Linear(width, hidden, bias=bias)

    def forward(self, x_bsh: Tensor, context: Context = ALONE, name: str = "") -> Tensor:
        """Hidden states (B, S, H) to (B, S, H); each token by itself."""
        weights_nk, experts_nk = self.router(x_bsh)
        tokens = self.latent_in(x_bsh).flatten(0, 1)
        rows, counts_e, state = self.dispatcher.dispatch(tokens, experts_nk)
        rows = self.experts(rows, counts_e)
        routed = self.latent_out(self.dispatcher.combine(rows, weights_nk, state))
        return routed.view_as(x_bsh) + self.shared(x_bsh)
