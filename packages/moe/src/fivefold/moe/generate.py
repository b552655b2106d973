"""Continuing a text token by token, with cached keys and values.

Legend: B sequences, S tokens of the prompt, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fivefold.moe.cache import KVCache
from fivefold.moe.errors import MoEInputError
from fivefold.parallel_core.sampling import draw, filter_logits

if TYPE_CHECKING:
    from fivefold.moe.model import MoEForCausalLM


@torch.no_grad()
def generate(
    model: "MoEForCausalLM",
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    streamer: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Continue every sequence of a batch by at most ``max_new_tokens`` tokens.

    Args:
        model: a whole model; it runs in eval mode and is left in the mode it was in.
        input_ids: prompts of equal length, integers (B, S), B and S at least 1.
        max_new_tokens: how many tokens to add at most.
        do_sample: draw tokens; the default takes the likeliest.
        temperature: divides the logits before drawing; above 0.
        top_k: draw from that many likeliest tokens only.
        top_p: then draw from the fewest likeliest tokens whose probabilities reach this sum only,
            in (0, 1].
        eos_token_id: ids that end a sequence; the default is the configuration's, an empty
            sequence is none. An ended sequence goes on with the first of them.
        generator: source of randomness; the default is torch's global one.
        streamer: called with the new token of every sequence (B,) as soon as it is known.

    Returns:
        Prompts and new tokens, (B, S + n), where n is less than ``max_new_tokens`` if all
        sequences ended.

    Raises:
        MoEInputError: an argument is out of range.
    """
    _check(model, input_ids, max_new_tokens, temperature, top_k, top_p)
    ends = _ends(model.config.eos_token_id if eos_token_id is None else eos_token_id)

    def pick(logits_bv: Tensor) -> Tensor:
        if not do_sample:
            return logits_bv.argmax(dim=-1)
        return draw(filter_logits(logits_bv, temperature, top_k, top_p), generator)

    tokens = [input_ids]
    cache = KVCache(input_ids.shape[1] + max_new_tokens)
    with _evaluating(model):
        for next_b in islice(_continue(model, input_ids, cache, pick, ends), max_new_tokens):
            tokens.append(next_b[:, None])
            if streamer is not None:
                streamer(next_b)
    return torch.cat(tokens, dim=1)


def _continue(
    model: "MoEForCausalLM",
    ids_bs: Tensor,
    cache: KVCache,
    pick: Callable[[Tensor], Tensor],
    ends: list[int],
) -> Iterator[Tensor]:
    """New tokens (B,), one step after the other, until every sequence has ended."""
    ends_n = torch.tensor(ends, dtype=ids_bs.dtype, device=ids_bs.device)
    ended_b = torch.zeros(ids_bs.shape[0], dtype=torch.bool, device=ids_bs.device)
    while not (ends and bool(ended_b.all())):
        next_b = pick(model(ids_bs, cache)[:, -1])
        if ends:
            next_b = torch.where(ended_b, ends_n[0], next_b)
            ended_b = ended_b | torch.isin(next_b, ends_n)
        yield next_b
        ids_bs = next_b[:, None]


@contextmanager
def _evaluating(model: "MoEForCausalLM") -> Iterator[None]:
    """Eval mode inside the block, whatever it was before and will be after."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _ends(ids: int | Sequence[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


def _check(
    model: "MoEForCausalLM",
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    if model.embed_tokens is None or model.lm_head is None:
        raise MoEInputError("generate needs a whole model; this one is a pipeline stage")
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise MoEInputError(
            f"input_ids has shape {tuple(input_ids.shape)}; it must be (at least 1 sequence, "
            "at least 1 token)"
        )
    rules = {
        f"max_new_tokens {max_new_tokens}: it must be at least 0": max_new_tokens >= 0,
        f"temperature {temperature}: it must be above 0": temperature > 0,
        f"top_k {top_k}: it must be at least 1, or None": top_k is None or top_k >= 1,
        f"top_p {top_p}: it must be in (0, 1], or None": top_p is None or 0 < top_p <= 1,
    }
    for message, legal in rules.items():
        if not legal:
            raise MoEInputError(message)
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= model.config.vocab_size:
        raise MoEInputError(
            f"input_ids are from {low} to {high}; the vocabulary has ids 0 to "
            f"{model.config.vocab_size - 1}"
        )
