"""Expert parallelism over any of attention's axes: the dispatcher that sends tokens around.

Steps of arXiv 2504.14960, section 3.3: sort by expert, all-to-all-v over EP, all-gather-v over ETP,
compute, reduce-scatter-v over ETP, all-to-all-v back, weigh and sum.

Legend: N tokens here, K experts per token, E experts of the layer, L experts of this rank,
H hidden width, P ranks of "ep", T ranks of "etp".
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fivefold.moe.dispatch import (
    LocalRouting,
    TokenDispatcher,
    copy_to_rows,
    first_rows,
    group_by_expert,
    take_rows,
)
from fivefold.moe.meanwhile import Meanwhile
from fivefold.parallel_core.collectives import (
    all_gather_v,
    all_to_all,
    gather_along,
    reduce_scatter_v,
)
from fivefold.parallel_core.exchange import start_all_to_all
from fivefold.parallel_core.topology import Topology


@dataclass(frozen=True, slots=True)
class FoldedRouting:
    """What ``dispatch`` did, for ``combine`` to undo.

    Attributes:
        local: order of this rank's own copies by global expert.
        sent: rows that went to each EP rank.
        received: rows that came from each EP rank.
        gathered: rows that each ETP rank received.
        arrival: order of the gathered rows by this rank's experts.
    """

    local: LocalRouting
    sent: list[int]
    received: list[int]
    gathered: list[int]
    arrival: LocalRouting


class ExpertRanks:
    """The ranks that share a layer's experts, and what each of them has.

    EP rank p holds experts [p·L, (p+1)·L); all ETP ranks of it hold slices of them.

    Args:
        num_experts: E, a multiple of the EP size.
        topology: the ranks; any folding of EP and ETP over the others.

    Attributes:
        ep: the ranks with other experts.
        etp: the ranks with other slices of the same experts.
        both: all of them.
        num_local: L.
        first: this rank's first expert.
    """

    def __init__(self, num_experts: int, topology: Topology):
        self.ep, self.etp = topology.axis("ep"), topology.axis("etp")
        self.both = topology.axis("etp-ep")
        self.num_local = num_experts // self.ep.size
        self.first = self.ep.rank * self.num_local
        where = [topology.layout.coordinates(rank) for rank in self.both.ranks]
        # Member of ``both`` that is (etp t, ep p), whatever the layout's order.
        self._members = [
            [
                where.index(w)
                for p in range(self.ep.size)
                for w in where
                if (w["etp"], w["ep"]) == (t, p)
            ]
            for t in range(self.etp.size)
        ]

    def of_all(self, x: Tensor) -> Tensor:
        """A small tensor of every rank, the same shape on each: to (T, P, ...)."""
        found = gather_along(x.unsqueeze(0).contiguous(), self.both, 0)
        return found[torch.tensor(self._members, device=found.device)]


class FoldedDispatcher(TokenDispatcher):
    """Sends each token copy to the ranks that hold its expert, and the results back.

    Tokens must be different on all ranks, as they are under sequence parallelism. With padding all
    ranks must pad to the same number of rows; no rank then waits for another's counts.

    Args:
        num_experts: E, a multiple of the EP size.
        topology: the ranks; any folding of EP and ETP over the others.
    """

    def __init__(self, num_experts: int, topology: Topology):
        super().__init__(num_experts)
        self.ranks = ExpertRanks(num_experts, topology)

    def dispatch(
        self,
        tokens_nh: Tensor,
        experts_nk: Tensor,
        kept_nk: Tensor | None = None,
        pad_to: int | None = None,
        meanwhile: Meanwhile | None = None,
    ) -> tuple[Tensor, Tensor, FoldedRouting]:
        """See ``TokenDispatcher.dispatch``; the rows are those of this rank's experts."""
        ep, etp, num_local = self.ranks.ep, self.ranks.etp, self.ranks.num_local
        local, counts_e = group_by_expert(experts_nk, self.num_experts, kept_nk, pad_to)
        if pad_to is None:
            first = self.ranks.first
            counts_tpl = self.ranks.of_all(counts_e)[..., first : first + num_local]
            sent = counts_e.view(ep.size, -1).sum(1).tolist()
            received_tp = counts_tpl.sum(2).tolist()
        else:
            shape = (etp.size, ep.size, num_local)
            counts_tpl = counts_e.new_full(shape, pad_to)
            sent = [num_local * pad_to] * ep.size
            received_tp = [sent] * etp.size
        local = first_rows(local, sum(sent))
        received = received_tp[etp.rank]
        gathered = [sum(of_rank) for of_rank in received_tp]
        rows = copy_to_rows(tokens_nh, local, experts_nk.shape[1])
        arrive = start_all_to_all(rows, received, sent, ep)
        if meanwhile is not None:
            meanwhile.run()
        rows = all_gather_v(arrive(), gathered, etp)
        arrival, counts_l = _sort_arrivals(counts_tpl, sum(gathered))
        routing = FoldedRouting(local, sent, received, gathered, arrival)
        return take_rows(rows, arrival.order, arrival.inverse), counts_l, routing

    def combine(self, rows: Tensor, weights_nk: Tensor, state: FoldedRouting) -> Tensor:
        """See ``TokenDispatcher.combine``; rows are this rank's parts of the experts' outputs."""
        rows = take_rows(rows, state.arrival.inverse, state.arrival.order)
        rows = reduce_scatter_v(rows, state.gathered, self.ranks.etp)
        rows = all_to_all(rows, state.sent, state.received, self.ranks.ep)
        return super().combine(rows, weights_nk, state.local)


def _sort_arrivals(counts_tpl: Tensor, total: int) -> tuple[LocalRouting, Tensor]:
    """The stable order by expert of rows that came sorted by (ETP rank, EP rank, expert)."""
    num_experts = counts_tpl.shape[-1]
    ids = torch.arange(num_experts, device=counts_tpl.device).repeat(counts_tpl[..., 0].numel())
    arrived = ids.repeat_interleave(counts_tpl.flatten(), output_size=total)
    return group_by_expert(arrived, num_experts)
