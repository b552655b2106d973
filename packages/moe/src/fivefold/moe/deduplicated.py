"""Expert parallelism that sends a token once to each rank, however many of its experts are there.

With K experts per token on P ranks a token's experts lie on fewer than K ranks: on
``P * (1 - (1 - 1/P)**K)`` of them on average where they are spread evenly, 5.25 for K = P = 8.
Copies for the experts are made, weighed and summed where the experts are, so the way back is as
short.

Legend: N tokens here, U rows that are sent from or arrive at this rank, K experts per token,
H hidden width, P ranks of "ep", T ranks of "etp", L experts of this rank.
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
    sum_copies,
)
from fivefold.moe.errors import MoEInputError
from fivefold.moe.folded import ExpertRanks
from fivefold.moe.meanwhile import Meanwhile
from fivefold.parallel_core.collectives import (
    all_gather_v,
    all_to_all,
    exchange_rows,
    gather_rows,
    reduce_scatter_v,
)
from fivefold.parallel_core.exchange import start_all_to_all
from fivefold.parallel_core.topology import Topology


@dataclass(frozen=True, slots=True)
class DeduplicatedRouting:
    """What ``dispatch`` did, for ``combine`` to undo.

    Attributes:
        outgoing: order of the pairs ``n * P + p`` of a token and a rank by rank.
        sent: tokens that went to each EP rank.
        received: tokens that came from each EP rank.
        gathered: tokens that each ETP rank received.
        local: order of the copies of all tokens here by this rank's experts.
    """

    outgoing: LocalRouting
    sent: list[int]
    received: list[int]
    gathered: list[int]
    local: LocalRouting


class DeduplicatedDispatcher(TokenDispatcher):
    """Sends each token once to every rank that holds experts of it, and one sum back.

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
    ) -> tuple[Tensor, Tensor, DeduplicatedRouting]:
        """See ``TokenDispatcher.dispatch``; the rows are those of this rank's experts."""
        if pad_to is not None:
            raise MoEInputError(
                f"padding to {pad_to} rows is for dispatchers that send a row for each copy; this "
                "one sends a token once to each rank, so leave capacity.pad out"
            )
        ep, etp = self.ranks.ep, self.ranks.etp
        experts = experts_nk if kept_nk is None else experts_nk.masked_fill(~kept_nk, -1)
        outgoing, counts_p = self._pairs(experts)
        received_tp = self.ranks.of_all(counts_p)[..., ep.rank].tolist()
        sent, received = counts_p.tolist(), received_tp[etp.rank]
        gathered = [sum(of_rank) for of_rank in received_tp]
        outgoing = first_rows(outgoing, sum(sent))
        rows = copy_to_rows(tokens_nh, outgoing, ep.size)
        arrive = start_all_to_all(rows, received, sent, ep)
        experts_uk = exchange_rows(experts[outgoing.order // ep.size], received, sent, ep)
        if meanwhile is not None:
            meanwhile.run()
        tokens = all_gather_v(arrive(), gathered, etp)
        experts_uk = gather_rows(experts_uk, gathered, etp) - self.ranks.first
        mine_uk = (experts_uk >= 0) & (experts_uk < self.ranks.num_local)
        local, counts_l = group_by_expert(experts_uk, self.ranks.num_local, mine_uk)
        local = first_rows(local, int(counts_l.sum()))
        routing = DeduplicatedRouting(outgoing, sent, received, gathered, local)
        return copy_to_rows(tokens, local, experts_nk.shape[1]), counts_l, routing

    def combine(self, rows: Tensor, weights_nk: Tensor, state: DeduplicatedRouting) -> Tensor:
        """See ``TokenDispatcher.combine``; rows are this rank's parts of the experts' outputs."""
        ep, etp = self.ranks.ep, self.ranks.etp
        weights = copy_to_rows(weights_nk, state.outgoing, ep.size)
        weights = all_to_all(weights, state.received, state.sent, ep)
        weights_uk = all_gather_v(weights, state.gathered, etp)
        tokens = reduce_scatter_v(sum_copies(rows, weights_uk, state.local), state.gathered, etp)
        tokens = all_to_all(tokens, state.sent, state.received, ep)
        ones = weights_nk.new_ones(len(weights_nk), ep.size)
        return sum_copies(tokens, ones, state.outgoing)

    def _pairs(self, experts_nk: Tensor) -> tuple[LocalRouting, Tensor]:
        """Which tokens go to which rank, sorted by rank, and how many to each (P,)."""
        size = self.ranks.ep.size
        ranks_p = torch.arange(size, device=experts_nk.device)
        of_copy = torch.div(experts_nk, self.ranks.num_local, rounding_mode="floor")
        wanted_np = (of_copy.unsqueeze(-1) == ranks_p).any(dim=1)
        return group_by_expert(ranks_p.expand(len(experts_nk), size), size, wanted_np)
