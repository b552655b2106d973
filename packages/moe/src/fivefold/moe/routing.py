"""How a router's scores become experts and weights: pure functions of tensors.

Legend: ... any leading dims, E experts, K experts per token, G groups of experts.
"""

import torch
from torch import Tensor

from fivefold.moe.router_config import RouterConfig


def score(logits: Tensor, config: RouterConfig) -> Tensor:
    """What each expert is worth to each token: logits (..., E) to scores (..., E)."""
    if config.score == "sigmoid":
        return logits.sigmoid()
    return logits.softmax(dim=-1)


def choose(scores: Tensor, bias: Tensor | None, config: RouterConfig, num_chosen: int) -> Tensor:
    """The experts of each token, best first: scores (..., E) to integers (..., K).

    Of experts or groups that are worth the same the one with the lower index is chosen.

    Args:
        scores: from ``score``.
        bias: added for the choice only (E,), or None.
        config: the router's.
        num_chosen: K.
    """
    worth = scores.detach() if bias is None else scores.detach() + bias
    if config.num_groups > 1:
        worth = _within_best_groups(worth, config)
    return _best(worth, num_chosen)


def weigh(scores: Tensor, experts: Tensor, config: RouterConfig) -> Tensor:
    """The weight of each chosen expert: scores (..., E), experts (..., K) to (..., K)."""
    weights = scores.gather(-1, experts)
    if config.normalize:
        total = weights.sum(dim=-1, keepdim=True)
        # Sigmoids can all be 0.
        weights = weights / (total + 1e-20 if config.score == "sigmoid" else total)
    return weights * config.scale if config.scale != 1 else weights


def _within_best_groups(worth: Tensor, config: RouterConfig) -> Tensor:
    """Minus infinity for the experts of all but a token's best groups.

    A group is worth what its two best experts are worth together (2412.19437, section 2.1.2).
    """
    grouped = worth.unflatten(-1, (config.num_groups, -1))
    of_group = grouped.topk(2, dim=-1).values.sum(dim=-1)
    best = _best(of_group, config.groups_per_token)
    out = torch.ones_like(of_group, dtype=torch.bool).scatter(-1, best, False)
    return grouped.masked_fill(out.unsqueeze(-1), -torch.inf).flatten(-2)


def _best(worth: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest, best first; of equal ones the lower index first."""
    # A stable sort rather than topk, which leaves the order of equal values open.
    return worth.sort(dim=-1, descending=True, stable=True).indices[..., :count]
