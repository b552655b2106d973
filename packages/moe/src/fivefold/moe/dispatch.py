"""From tokens to rows grouped by expert, and back.

Legend: N tokens, K experts per token, E experts, H hidden width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class LocalRouting:
    """Where each copy of a token went.

    Args:
        order: copy ``n * K + slot`` that each grouped row holds, (N * K,).
        inverse: grouped row that holds each copy, (N * K,).
    """

    order: Tensor
    inverse: Tensor


class TokenDispatcher(nn.Module):
    """Groups the tokens' copies by expert where all experts are on this rank; drops nothing.

    The seam of expert parallelism: a subclass sends the copies to the ranks that hold their
    experts. What ``dispatch`` returns as state is opaque to callers.
    """

    def __init__(self, num_experts: int):
        super().__init__()
        self.num_experts = num_experts

    def dispatch(self, tokens_nh: Tensor, experts_nk: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Copy every token to its experts.

        Args:
            tokens_nh: (N, H).
            experts_nk: expert of each copy, integers in [0, E), (N, K).

        Returns:
            Rows sorted by expert and, within one, by token (N * K, H); rows of each expert (E,);
            and the state that ``combine`` needs.
        """
        routing, counts_e = sort_by_expert(experts_nk, self.num_experts)
        return copy_to_rows(tokens_nh, routing, experts_nk.shape[1]), counts_e, routing

    def combine(self, rows: Tensor, weights_nk: Tensor, state: Any) -> Tensor:
        """Sum each token's copies (N * K, H), weighted (N, K), in slot order: (N, H)."""
        return sum_copies(rows, weights_nk, state)


def sort_by_expert(experts_nk: Tensor, num_experts: int) -> tuple[LocalRouting, Tensor]:
    """The stable order of the copies by expert, and the copies of each expert (E,)."""
    sorted_experts, order = experts_nk.flatten().sort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    ids_e = torch.arange(num_experts, device=order.device)
    # Borders of the sorted ids give the counts without atomics and without waiting for a device.
    stops_e = torch.searchsorted(sorted_experts, ids_e, right=True)
    return LocalRouting(order, inverse), stops_e.diff(prepend=stops_e.new_zeros(1))


def copy_to_rows(tokens_nh: Tensor, routing: LocalRouting, num_copies: int) -> Tensor:
    """Tokens (N, H) to grouped rows (N * num_copies, H)."""
    return _TakeRows.apply(tokens_nh, routing.order, routing.inverse, num_copies)


def sum_copies(rows: Tensor, weights_nk: Tensor, routing: LocalRouting) -> Tensor:
    """Grouped rows (N * K, H) and gate weights (N, K) to tokens (N, H)."""
    copies_nkh = take_rows(rows, routing.inverse, routing.order).unflatten(0, weights_nk.shape)
    return (copies_nkh * weights_nk.unsqueeze(-1)).sum(dim=1)


def take_rows(rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """Rows in another order: row ``i`` of the output is row ``index[i]`` of the input.

    Args:
        rows: (R, H).
        index: a permutation of the R rows.
        inverse: the permutation that undoes it, for the backward.
    """
    return _TakeRows.apply(rows, index, inverse, 1)


class _TakeRows(torch.autograd.Function):
    """Row ``i`` of the output is row ``index[i] // num_copies`` of the input.

    ``index`` is a permutation whose inverse is known, so the backward is a take too and sums the
    copies in slot order; torch's own index backward adds them in whatever order threads come.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, num_copies: int) -> Tensor:
        ctx.save_for_backward(index, inverse)
        ctx.num_copies = num_copies
        return x.index_select(0, index if num_copies == 1 else index // num_copies)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        index, inverse = ctx.saved_tensors
        grad = take_rows(grads[0], inverse, index)
        if ctx.num_copies > 1:
            grad = grad.unflatten(0, (-1, ctx.num_copies)).sum(dim=1)
        return grad, None, None, None
