"""From tokens to rows grouped by expert, and back.

Legend: N tokens, K experts per token, E experts, H hidden width, C rows of each expert where they
are padded.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fivefold.moe.meanwhile import Meanwhile


@dataclass(frozen=True, slots=True)
class LocalRouting:
    """Where each copy of a token went.

    Args:
        order: copy ``n * K + slot`` that each grouped row holds, -1 in an empty row, (rows,).
        inverse: grouped row that holds each copy, -1 for a copy that was dropped, (N * K,).
        whole: whether there are no -1, so that one permutation undoes the other.
    """

    order: Tensor
    inverse: Tensor
    whole: bool = True


class TokenDispatcher(nn.Module):
    """Groups the tokens' copies by expert where all experts are on this rank.

    The seam of expert parallelism: a subclass sends the copies to the ranks that hold their
    experts. What ``dispatch`` returns as state is opaque to callers.
    """

    def __init__(self, num_experts: int):
        super().__init__()
        self.num_experts = num_experts

    def dispatch(
        self,
        tokens_nh: Tensor,
        experts_nk: Tensor,
        kept_nk: Tensor | None = None,
        pad_to: int | None = None,
        meanwhile: Meanwhile | None = None,
    ) -> tuple[Tensor, Tensor, Any]:
        """Copy every token to its experts.

        Args:
            tokens_nh: (N, H).
            experts_nk: expert of each copy, integers in [0, E), (N, K).
            kept_nk: which copies are made, (N, K); None makes all.
            pad_to: rows that each expert gets from this rank, C, at least its copies; the others
                are zeros. None gives each expert its copies.
            meanwhile: work that needs none of this, to do while rows are on their way.

        Returns:
            Rows sorted by expert and, within one, by token; rows of each expert (E,); and the state
            that ``combine`` needs. More rows, of zeros, may come behind those of the last expert.
        """
        routing, counts_e = group_by_expert(experts_nk, self.num_experts, kept_nk, pad_to)
        return copy_to_rows(tokens_nh, routing, experts_nk.shape[1]), counts_e, routing

    def combine(self, rows: Tensor, weights_nk: Tensor, state: Any) -> Tensor:
        """Sum each token's copies, weighted (N, K), in slot order: (N, H); dropped ones are 0."""
        return sum_copies(rows, weights_nk, state)


def group_by_expert(
    experts_nk: Tensor,
    num_experts: int,
    kept_nk: Tensor | None = None,
    pad_to: int | None = None,
) -> tuple[LocalRouting, Tensor]:
    """The stable order of the copies by expert, and the rows of each expert (E,).

    Args:
        experts_nk: expert of each copy (N, K).
        num_experts: E.
        kept_nk: which copies are kept (N, K); the others come after all experts' rows.
        pad_to: rows of each expert, C; None is as many as it has copies.
    """
    experts = experts_nk.flatten()
    if kept_nk is not None:
        experts = experts.masked_fill(~kept_nk.flatten(), num_experts)
    sorted_experts, order = experts.sort(stable=True)
    ids_e = torch.arange(num_experts, device=order.device)
    # Borders of the sorted ids give the counts without atomics and without waiting for a device.
    stops_e = torch.searchsorted(sorted_experts, ids_e, right=True)
    counts_e = stops_e.diff(prepend=stops_e.new_zeros(1))
    if pad_to is not None:
        return _pad(sorted_experts, order, stops_e - counts_e, pad_to)
    places = torch.arange(order.numel(), device=order.device)
    inverse = torch.empty_like(order)
    if kept_nk is None:
        inverse[order] = places
        return LocalRouting(order, inverse), counts_e
    dropped = sorted_experts == num_experts
    inverse[order] = places.masked_fill(dropped, -1)
    return LocalRouting(order.masked_fill(dropped, -1), inverse, whole=False), counts_e


def _pad(
    sorted_experts: Tensor, order: Tensor, starts_e: Tensor, pad_to: int
) -> tuple[LocalRouting, Tensor]:
    """Sorted copies into ``pad_to`` rows for each expert."""
    num_experts = len(starts_e)
    kept = sorted_experts < num_experts
    places = torch.arange(order.numel(), device=order.device)
    first = starts_e[sorted_experts.clamp(max=num_experts - 1)]
    slots = sorted_experts * pad_to + places - first
    # One row more, for the copies that are dropped.
    rows = order.new_full((num_experts * pad_to + 1,), -1)
    rows[slots.where(kept, rows.new_tensor(num_experts * pad_to))] = order
    inverse = torch.empty_like(order)
    inverse[order] = slots.masked_fill(~kept, -1)
    return LocalRouting(rows[:-1], inverse, whole=False), torch.full_like(starts_e, pad_to)


def first_rows(routing: LocalRouting, count: int) -> LocalRouting:
    """The routing without the rows from ``count`` on, which hold dropped copies."""
    if count == len(routing.order):
        return routing
    return LocalRouting(routing.order[:count], routing.inverse, whole=False)


def copy_to_rows(tokens_nh: Tensor, routing: LocalRouting, num_copies: int) -> Tensor:
    """Tokens (N, H) to grouped rows (rows, H); empty rows are zeros."""
    return _TakeRows.apply(tokens_nh, routing.order, routing.inverse, num_copies, routing.whole)


def sum_copies(rows: Tensor, weights_nk: Tensor, routing: LocalRouting) -> Tensor:
    """Grouped rows (rows, H) and gate weights (N, K) to tokens (N, H)."""
    return _SumCopies.apply(rows, weights_nk, routing.order, routing.inverse, routing.whole)


def take_rows(rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """Rows in another order: row ``i`` of the output is row ``index[i]`` of the input.

    Args:
        rows: (R, H).
        index: a permutation of the R rows.
        inverse: the permutation that undoes it, for the backward.
    """
    return _TakeRows.apply(rows, index, inverse, 1, True)


class _TakeRows(torch.autograd.Function):
    """Row ``i`` of the output is row ``index[i] // num_copies`` of the input, or 0 for -1.

    ``inverse`` says for each copy where it went, or -1, so the backward is a take too and sums the
    copies in slot order; torch's own index backward adds them in whatever order threads come.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, num_copies: int, whole: bool
    ) -> Tensor:
        ctx.save_for_backward(index, inverse)
        ctx.num_copies, ctx.whole = num_copies, whole
        if whole:
            return x.index_select(0, index if num_copies == 1 else index // num_copies)
        if not len(x):
            return x.new_zeros(len(index), *x.shape[1:])
        rows = x.index_select(0, index.clamp(min=0) // num_copies)
        return rows.masked_fill_((index < 0).unsqueeze(-1), 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        index, inverse = ctx.saved_tensors
        grad = _TakeRows.apply(grads[0], inverse, index, 1, ctx.whole)
        if ctx.num_copies > 1:
            grad = grad.unflatten(0, (-1, ctx.num_copies)).sum(dim=1)
        return grad, None, None, None, None


class _SumCopies(torch.autograd.Function):
    """Each token's rows, weighed and summed, without a copy of the rows in the tokens' order."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weights_nk: Tensor, order: Tensor, inverse: Tensor, whole: bool
    ) -> Tensor:
        ctx.save_for_backward(rows, weights_nk, order, inverse)
        ctx.whole = whole
        if not len(rows) or not weights_nk.numel():
            return rows.new_zeros(len(weights_nk), rows.shape[1])
        places_nk = inverse.view(weights_nk.shape)
        weights_nk = weights_nk.to(rows.dtype)
        if not whole:
            weights_nk = weights_nk.masked_fill(places_nk < 0, 0)
            places_nk = places_nk.clamp(min=0)
        return F.embedding_bag(places_nk, rows, mode="sum", per_sample_weights=weights_nk)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        rows, weights_nk, order, inverse = ctx.saved_tensors
        num_copies = weights_nk.shape[1]
        # In the rows' order, where each row meets its token's gradient and its weight once.
        grad_rows = _TakeRows.apply(grads[0], order, inverse, num_copies, ctx.whole)
        flat = weights_nk.reshape(-1, 1)
        weights = _TakeRows.apply(flat, order, inverse, 1, ctx.whole)
        grad_weights = torch.linalg.vecdot(grad_rows, rows).unsqueeze(-1)
        grad_weights = _TakeRows.apply(grad_weights, inverse, order, 1, ctx.whole)
        grad_weights = grad_weights.view(weights_nk.shape).to(weights_nk.dtype)
        return grad_rows * weights.to(rows.dtype), grad_weights, None, None, None
