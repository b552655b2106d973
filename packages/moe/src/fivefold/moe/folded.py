"""Expert parallelism over any of attention's axes: the dispatcher that sends tokens around.

Steps of arXiv 2504.14960, section 3.3, without dropping: sort by expert, all-to-all-v over EP,
all-gather-v over ETP, compute, reduce-scatter-v over ETP, all-to-all-v back, weigh and sum.

Legend: N tokens here, K experts per token, E experts of the layer, L experts of this rank,
H hidden width, P ranks of "ep", T ranks of "etp".
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fivefold.moe.dispatch import (
    LocalRouting,
    TokenDispatcher,
    copy_to_rows,
    sort_by_expert,
)
from fivefold.parallel_core.collectives import (
    all_gather_v,
    all_to_all,
    gather_along,
    reduce_scatter_v,
)
from fivefold.parallel_core.topology import Topology


@dataclass(frozen=True, slots=True)
class FoldedRouting:
    """What ``dispatch`` did, for ``combine`` to undo.

    Attributes:
        local: order of this rank's own copies by global expert.
        sent: copies that went to each EP rank.
        received: copies that came from each EP rank.
        gathered: copies that each ETP rank received.
        arrival: order of the gathered rows by this rank's experts.
    """

    local: LocalRouting
    sent: list[int]
    received: list[int]
    gathered: list[int]
    arrival: LocalRouting


class FoldedDispatcher(TokenDispatcher):
    """Sends each token copy to the ranks that hold its expert, and the results back.

    EP rank p holds experts [p·L, (p+1)·L); all ETP ranks of it hold slices of them. Tokens must be
    different on all ranks, as they are under sequence parallelism.

    Args:
        num_experts: E, a multiple of the EP size.
        topology: the ranks; any folding of EP and ETP over the others.
    """

    def __init__(self, num_experts: int, topology: Topology):
        super().__init__(num_experts)
        self.ep, self.etp = topology.axis("ep"), topology.axis("etp")
        self.both = topology.axis("etp-ep")
        where = [topology.layout.coordinates(rank) for rank in self.both.ranks]
        # Row of the gathered counts that holds (etp t, ep p), whatever the layout's order.
        self._rows = [
            [
                where.index(w)
                for p in range(self.ep.size)
                for w in where
                if (w["etp"], w["ep"]) == (t, p)
            ]
            for t in range(self.etp.size)
        ]

    def dispatch(
        self, tokens_nh: Tensor, experts_nk: Tensor
    ) -> tuple[Tensor, Tensor, FoldedRouting]:
        """See ``TokenDispatcher.dispatch``; the rows are those of this rank's experts."""
        local, counts_e = sort_by_expert(experts_nk, self.num_experts)
        rows = copy_to_rows(tokens_nh, local, experts_nk.shape[1])
        counts_tpl = self._exchange_counts(counts_e)
        sent = counts_e.view(self.ep.size, -1).sum(1).tolist()
        received_tp = counts_tpl.sum(2).tolist()
        received = received_tp[self.etp.rank]
        gathered = [sum(of_rank) for of_rank in received_tp]
        rows = all_to_all(rows, received, sent, self.ep)
        rows = all_gather_v(rows, gathered, self.etp)
        arrival, counts_l = _sort_arrivals(counts_tpl)
        routing = FoldedRouting(local, sent, received, gathered, arrival)
        return copy_to_rows(rows, arrival, 1), counts_l, routing

    def combine(self, rows: Tensor, weights_nk: Tensor, state: FoldedRouting) -> Tensor:
        """See ``TokenDispatcher.combine``; rows are this rank's parts of the experts' outputs."""
        back = LocalRouting(order=state.arrival.inverse, inverse=state.arrival.order)
        rows = copy_to_rows(rows, back, 1)
        rows = reduce_scatter_v(rows, state.gathered, self.etp)
        rows = all_to_all(rows, state.sent, state.received, self.ep)
        return super().combine(rows, weights_nk, state.local)

    def _exchange_counts(self, counts_e: Tensor) -> Tensor:
        """Copies of each of this rank's experts that come from every (ETP, EP) rank: (T, P, L)."""
        counts = gather_along(counts_e, self.both, 0).view(self.both.size, self.num_experts)
        first = self.ep.rank * (self.num_experts // self.ep.size)
        mine = counts[:, first : first + self.num_experts // self.ep.size]
        return mine[torch.tensor(self._rows, device=mine.device)]


def _sort_arrivals(counts_tpl: Tensor) -> tuple[LocalRouting, Tensor]:
    """The stable order by expert of rows that came sorted by (ETP rank, EP rank, expert)."""
    num_experts = counts_tpl.shape[-1]
    ids = torch.arange(num_experts, device=counts_tpl.device).repeat(counts_tpl[..., 0].numel())
    return sort_by_expert(ids.repeat_interleave(counts_tpl.flatten()), num_experts)


def folded_dispatcher(dispatcher: nn.Module, topology: Topology) -> nn.Module:
    """The dispatcher for ``topology``; the given one where every expert is whole on this rank."""
    if topology.size("etp-ep") == 1 or not isinstance(dispatcher, TokenDispatcher):
        return dispatcher
    return FoldedDispatcher(dispatcher.num_experts, topology)
