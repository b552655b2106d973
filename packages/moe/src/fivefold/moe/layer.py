"""The mixture-of-experts layer: route, dispatch, compute, combine.

Legend: B sequences, S tokens of a sequence here, N = B * S, E experts, K experts per token,
H hidden width.
"""

from functools import partial

from torch import Tensor, nn

from fivefold.kernels import Linear
from fivefold.moe.capacity import Capacity
from fivefold.moe.config import MoEConfig
from fivefold.moe.dispatch import TokenDispatcher
from fivefold.moe.experts import Experts
from fivefold.moe.meanwhile import Meanwhile
from fivefold.moe.mlp import GatedMLP
from fivefold.moe.router import Router
from fivefold.parallel_core.losses import SideOutputs


class MoELayer(nn.Module):
    """A feed-forward layer of which every token uses ``num_experts_per_token`` experts.

    In training it counts in ``side``, where there is a capacity, the copies that found no place as
    ``dropped.<layer>``.

    Args:
        config: the model's configuration.
        layer: global index of the layer, under which its load is counted.
        side: where the router puts its losses and counts; its own when left out.

    Attributes:
        router: chooses the experts.
        capacity: chooses the copies that too popular experts do not take.
        dispatcher: seam; moves token copies to the experts and back.
        experts: the networks that this rank holds.
        shared: the network that every token uses; None without one.
        shared_gate: weighs the shared network's output by a sigmoid of the token; None without.
    """

    shared: GatedMLP | None
    shared_gate: nn.Linear | None

    def __init__(self, config: MoEConfig, layer: int = 0, side: SideOutputs | None = None):
        super().__init__()
        self.layer = layer
        self.side = side if side is not None else SideOutputs()
        self.router = Router(
            config.num_experts,
            config.hidden_size,
            config.num_experts_per_token,
            self.side,
            layer,
            config.router,
            config.initializer_range,
        )
        self.capacity = Capacity(config.capacity, config.num_experts)
        self.dispatcher = TokenDispatcher(config.num_experts)
        self.experts = Experts(
            config.num_experts,
            config.hidden_size,
            config.expert_intermediate_size,
            config.initializer_range,
        )
        width, hidden = config.shared_intermediate_size, config.hidden_size
        self.shared = GatedMLP(hidden, width) if width else None
        self.shared_gate = Linear(hidden, 1, bias=False) if config.shared_gate else None
        self.initializer_range = config.initializer_range
        self._reset_shared()

    def reset_parameters(self) -> None:
        """Draw the weights anew, as when the layer was made: router, experts, what is shared."""
        self.router.reset_parameters()
        self.experts.reset_parameters()
        self._reset_shared()

    def _reset_shared(self) -> None:
        for module in (self.shared, self.shared_gate):
            for parameter in module.parameters() if module is not None else ():
                nn.init.normal_(parameter, std=self.initializer_range)

    def forward(self, x_bsh: Tensor) -> Tensor:
        """Hidden states (B, S, H) to (B, S, H)."""
        shared = (
            None
            if self.shared is None
            else Meanwhile(partial(self._run_shared, self.shared, x_bsh))
        )
        weights_nk, experts_nk = self.router(x_bsh)
        kept_nk, pad_to = self._limit(weights_nk, experts_nk, x_bsh)
        rows, counts_e, state = self.dispatcher.dispatch(
            x_bsh.flatten(0, 1), experts_nk, kept_nk, pad_to, shared
        )
        rows = self.experts(rows, counts_e)
        y_bsh = self.dispatcher.combine(rows, weights_nk, state).view_as(x_bsh)
        return y_bsh if shared is None else y_bsh + shared.value

    def _limit(
        self, weights_nk: Tensor, experts_nk: Tensor, x_bsh: Tensor
    ) -> tuple[Tensor | None, int | None]:
        """Which copies stay, None for all, and how many rows each expert gets, None for as many."""
        if not self.training or self.capacity.config.factor is None:
            return None, None
        shape = (*x_bsh.shape[:2], -1)
        kept_bsk = self.capacity(experts_nk.view(shape), weights_nk.detach().view(shape))
        self.side.count(f"dropped.{self.layer}", (~kept_bsk).sum())
        rows = self.capacity.most_rows(x_bsh.shape[0], x_bsh.shape[1], experts_nk.shape[1])
        return kept_bsk.reshape(experts_nk.shape), rows if self.capacity.config.pad else None

    def _run_shared(self, shared: GatedMLP, x_bsh: Tensor) -> Tensor:
        y_bsh = shared(x_bsh)
        return y_bsh if self.shared_gate is None else self.shared_gate(x_bsh).sigmoid() * y_bsh
