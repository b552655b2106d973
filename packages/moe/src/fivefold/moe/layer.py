"""The mixture-of-experts layer: route, dispatch, compute, combine.

Legend: B sequences, S tokens of a sequence here, N = B * S, E experts, K experts per token,
H hidden width.
"""

from torch import Tensor, nn

from fivefold.moe.config import MoEConfig
from fivefold.moe.dispatch import TokenDispatcher
from fivefold.moe.experts import Experts
from fivefold.moe.router import Router
from fivefold.parallel_core.losses import SideOutputs


class MoELayer(nn.Module):
    """A feed-forward layer of which every token uses ``num_experts_per_token`` experts.

    Args:
        config: the model's configuration.
        layer: global index of the layer, under which its load is counted.
        side: where the router puts its losses and counts; its own when left out.

    Attributes:
        router: chooses the experts.
        dispatcher: seam; moves token copies to the experts and back.
        experts: the networks that this rank holds.
    """

    def __init__(self, config: MoEConfig, layer: int = 0, side: SideOutputs | None = None):
        super().__init__()
        self.router = Router(
            config.num_experts,
            config.hidden_size,
            config.num_experts_per_token,
            side if side is not None else SideOutputs(),
            layer,
            aux_loss_coef=config.aux_loss_coef,
            z_loss_coef=config.z_loss_coef,
            initializer_range=config.initializer_range,
        )
        self.dispatcher = TokenDispatcher(config.num_experts)
        self.experts = Experts(
            config.num_experts,
            config.hidden_size,
            config.expert_intermediate_size,
            config.initializer_range,
        )

    def reset_parameters(self) -> None:
        """Draw the weights anew, as when the layer was made: router, then experts."""
        self.router.reset_parameters()
        self.experts.reset_parameters()

    def forward(self, x_bsh: Tensor) -> Tensor:
        """Hidden states (B, S, H) to (B, S, H)."""
        weights_nk, experts_nk = self.router(x_bsh)
        rows, counts_e, state = self.dispatcher.dispatch(x_bsh.flatten(0, 1), experts_nk)
        rows = self.experts(rows, counts_e)
        return self.dispatcher.combine(rows, weights_nk, state).view_as(x_bsh)
