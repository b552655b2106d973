"""Expert parallelism without an exchange of rows: every rank sees all tokens.

All ranks that share the experts gather each other's tokens, run those of their own experts and sum
the results. More is sent than a dispatch of the copies would, a row of each token to every rank
instead of K rows, but in one large message of a size known before the routing: for many experts per
token on few ranks.

Legend: N tokens here, R tokens of all the ranks, K experts per token, H hidden width.
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
from fivefold.parallel_core.collectives import all_gather_v, gather_rows, reduce_scatter_v
from fivefold.parallel_core.topology import Topology


@dataclass(frozen=True, slots=True)
class GatheredRouting:
    """What ``dispatch`` did, for ``combine`` to undo.

    Attributes:
        sizes: tokens of each rank.
        local: order of the copies of all tokens by this rank's experts; others are dropped.
    """

    sizes: list[int]
    local: LocalRouting


class GatheredDispatcher(TokenDispatcher):
    """Gathers the tokens of all ranks that share the experts; each runs its own experts' copies.

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
    ) -> tuple[Tensor, Tensor, GatheredRouting]:
        """See ``TokenDispatcher.dispatch``; the rows are those of this rank's experts."""
        if pad_to is not None:
            raise MoEInputError(
                f"padding to {pad_to} rows is for dispatchers that send rows; this one gathers "
                "tokens, in messages of one size as they are"
            )
        both = self.ranks.both
        count = torch.tensor([len(tokens_nh)], device=experts_nk.device)
        sizes = gather_rows(count, [1] * both.size, both).tolist()
        experts = experts_nk if kept_nk is None else experts_nk.masked_fill(~kept_nk, -1)
        experts_rk = gather_rows(experts, sizes, both) - self.ranks.first
        mine_rk = (experts_rk >= 0) & (experts_rk < self.ranks.num_local)
        local, counts_l = group_by_expert(experts_rk, self.ranks.num_local, mine_rk)
        local = first_rows(local, int(counts_l.sum()))
        tokens_rh = all_gather_v(tokens_nh, sizes, both)
        rows = copy_to_rows(tokens_rh, local, experts_nk.shape[1])
        return rows, counts_l, GatheredRouting(sizes, local)

    def combine(self, rows: Tensor, weights_nk: Tensor, state: GatheredRouting) -> Tensor:
        """See ``TokenDispatcher.combine``; rows are this rank's parts of the experts' outputs."""
        weights_rk = all_gather_v(weights_nk, state.sizes, self.ranks.both)
        tokens_rh = sum_copies(rows, weights_rk, state.local)
        return reduce_scatter_v(tokens_rh, state.sizes, self.ranks.both)
