"""From the logits of a next token to the token.

Legend: B sequences, T tokens so far, V vocabulary.
"""

import torch
from torch import Tensor


def filter_logits(
    logits_bv: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> Tensor:
    """Logits to draw from: scaled, and minus infinity for tokens that are left out.

    Args:
        logits_bv: (B, V).
        temperature: divides them; above 0.
        top_k: keep that many likeliest tokens only.
        top_p: then keep the fewest likeliest tokens whose probabilities reach this sum only.

    Returns:
        (B, V) in float32 or wider.
    """
    logits_bv = logits_bv.to(torch.promote_types(logits_bv.dtype, torch.float32)) / temperature
    if top_k is not None and top_k < logits_bv.shape[-1]:
        least_b1 = logits_bv.topk(top_k).values[:, -1:]
        logits_bv = logits_bv.masked_fill(logits_bv < least_b1, -torch.inf)
    if top_p is not None and top_p < 1:
        sorted_bv, order_bv = logits_bv.sort(descending=True, stable=True)
        before_bv = sorted_bv.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
        before_bv[:, 0] = 0  # the likeliest token stays, whatever its probability
        kept_bv = sorted_bv.masked_fill(before_bv >= top_p, -torch.inf)
        logits_bv = kept_bv.scatter(-1, order_bv, kept_bv)
    return logits_bv


def penalise_repetition(logits_bv: Tensor, seen_bv: Tensor, penalty: float) -> Tensor:
    """Make tokens that were there before less likely: CTRL, arXiv 1909.05858, section 4.1.

    Args:
        logits_bv: (B, V).
        seen_bv: (B, V), True for tokens that were there.
        penalty: positive logits are divided by it and others multiplied; 1 changes nothing.
    """
    wide_bv = logits_bv.to(torch.promote_types(logits_bv.dtype, torch.float32))
    less_bv = torch.where(wide_bv > 0, wide_bv / penalty, wide_bv * penalty)
    return torch.where(seen_bv, less_bv, wide_bv)


def draw(logits_bv: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One token (B,) of each row, with the probabilities that the logits have."""
    return logits_bv.softmax(dim=-1).multinomial(1, generator=generator)[:, 0]
