"""Continuing texts token by token in constant memory per token.

Legend: B sequences, S tokens of the prompt, T tokens so far, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from fivefold.hybrid_ssm.beams import BeamRules, Beams
from fivefold.hybrid_ssm.cache import HybridCache
from fivefold.hybrid_ssm.errors import HybridInputError
from fivefold.hybrid_ssm.prompts import Prompts, check_ids, pad_prompts
from fivefold.hybrid_ssm.reader import Reader
from fivefold.hybrid_ssm.stopping import Stopping, TextDecoder
from fivefold.parallel_core.sampling import draw, filter_logits, penalise_repetition

if TYPE_CHECKING:
    from fivefold.hybrid_ssm.model import HybridForCausalLM


class Streamer(Protocol):
    """What transformers' streamers are: told the prompt, each new token, and the end."""

    def put(self, value: Tensor) -> None:
        """Take the prompts (B, S), then the next token of every sequence (B,)."""

    def end(self) -> None:
        """There are no more."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How the next token is chosen from its logits; see ``generate``.

    Raises:
        HybridInputError: a value is out of range.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        rules = {
            "temperature": (self.temperature > 0, "above 0"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1, or None"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "in (0, 1], or None"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
        }
        for name, (legal, rule) in rules.items():
            if not legal:
                raise HybridInputError(f"{name} is {getattr(self, name)!r}; it must be {rule}")

    def __call__(self, logits_bv: Tensor, seen_bv: Tensor | None) -> Tensor:
        """The next tokens (B,); ``seen_bv`` marks the tokens that there were."""
        logits_bv = self.penalised(logits_bv, seen_bv)
        if not self.do_sample:
            return logits_bv.argmax(dim=-1)
        filtered = filter_logits(logits_bv, self.temperature, self.top_k, self.top_p)
        return draw(filtered, self.generator)

    def seen(self, prompts: Prompts, vocab_size: int) -> Tensor | None:
        """Which tokens there were (B, V), if that matters."""
        return None if self.repetition_penalty == 1.0 else prompts.seen(vocab_size)

    def penalised(self, logits_bv: Tensor, seen_bv: Tensor | None) -> Tensor:
        """With those tokens less likely that ``seen_bv`` marks."""
        if seen_bv is None:
            return logits_bv
        return penalise_repetition(logits_bv, seen_bv, self.repetition_penalty)


@torch.no_grad()
def generate(
    model: "HybridForCausalLM",
    input_ids: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: TextDecoder | None = None,
    use_cache: bool = True,
    past_key_values: HybridCache | None = None,
    prefill_chunk_size: int | None = 2048,
    generator: torch.Generator | None = None,
    streamer: Callable[[Tensor], None] | Streamer | None = None,
) -> Tensor:
    """Continue every sequence of a batch by at most ``max_new_tokens`` tokens.

    Arguments that transformers' ``generate`` has mean the same there.

    Args:
        model: a whole model; it runs in eval mode and is left in the mode it was in.
        input_ids: prompts of equal length, integers (B, S), B and S at least 1; or a list of lists
            of ids, which are padded on the left if their lengths differ.
        max_new_tokens: how many tokens to add at most.
        attention_mask: (B, S), 0 at padding, which must be on the left.
        do_sample: draw tokens; the default takes the likeliest.
        temperature: divides the logits before drawing; above 0.
        top_k: draw from that many likeliest tokens only.
        top_p: then draw from the fewest likeliest tokens whose probabilities reach this sum only,
            in (0, 1].
        repetition_penalty: makes tokens that were there less likely, above 1; see ``sampling``.
        num_beams: continuations of each prompt that are searched at once, see ``beams``; 1
            searches none. They end at ``eos_token_id`` only, and are neither drawn nor streamed.
        length_penalty: a text's log-probability is divided by its number of new tokens to this
            power; above 0 favours long ones.
        early_stopping: True ends a search when so many texts as beams have ended; False also goes
            on while the best beam would win at its present length; "never", at its best length.
        eos_token_id: ids that end a sequence; the default is the configuration's, an empty
            sequence is none.
        pad_token_id: what an ended sequence goes on with; the default is the configuration's, or
            the first id that ends a sequence.
        stop_strings: texts that end a sequence when they appear in what it has new.
        tokenizer: with ``decode``; needed for ``stop_strings``.
        use_cache: remember states and keys; without, every step reads all tokens again.
        past_key_values: memory of the first tokens of ``input_ids``, which are not read again; it
            is extended (by the prompts only, with beams), and must have room.
        prefill_chunk_size: tokens of the prompt that are read at once, so that the memory this
            takes does not depend on its length; None reads all at once.
        generator: source of randomness; the default is torch's global one.
        streamer: called with the new token of every sequence (B,) as soon as it is known, or an
            object with ``put`` and ``end``, as transformers' streamers are.

    Returns:
        Prompts and new tokens, (B, S + n), where n is less than ``max_new_tokens`` if all
        sequences ended.

    Raises:
        HybridInputError: an argument is out of range.
    """
    choice = Choice(
        do_sample=do_sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        generator=generator,
    )
    config = model.config
    pad = config.pad_token_id if pad_token_id is None else pad_token_id
    prompts = pad_prompts(input_ids, attention_mask, pad)
    _check(model, prompts, max_new_tokens, prefill_chunk_size)
    ends = config.eos_token_id if eos_token_id is None else eos_token_id
    stopping = Stopping(ends, pad, stop_strings, tokenizer)
    rules = BeamRules(
        num_beams=num_beams, length_penalty=length_penalty, early_stopping=early_stopping
    )
    if num_beams > 1:
        _check_beams(do_sample, streamer, stopping)
    reader = Reader(model, prompts, max_new_tokens, use_cache, past_key_values, prefill_chunk_size)
    if num_beams > 1 and max_new_tokens > 0:
        beams = Beams(rules, prompts.ids, max_new_tokens, stopping.ends, stopping.pad)
        with _evaluating(model):
            new = _search(reader, prompts, choice, beams)
        return torch.cat((prompts.ids, new), dim=1)
    tokens = [prompts.ids]
    tell = _Teller(streamer, prompts.ids)
    with _evaluating(model):
        for next_b in islice(_continue(reader, prompts, choice, stopping), max_new_tokens):
            tokens.append(next_b[:, None])
            tell(next_b)
    tell.end()
    return torch.cat(tokens, dim=1)


def _continue(
    reader: Reader, prompts: Prompts, choice: Choice, stopping: Stopping
) -> Iterator[Tensor]:
    """New tokens (B,), one step after the other, until every sequence has ended."""
    seen_bv = choice.seen(prompts, reader.model.config.vocab_size)
    logits_bv = reader.prefill()
    while True:
        next_b = stopping(choice(logits_bv, seen_bv))
        yield next_b
        if stopping.all_ended():
            return
        if seen_bv is not None:
            seen_bv.scatter_(1, next_b[:, None], True)
        logits_bv = reader.step(next_b)


def _search(reader: Reader, prompts: Prompts, choice: Choice, beams: Beams) -> Tensor:
    """The new tokens (B, T) that beams find."""
    logits_bv = reader.prefill()
    seen_bv = choice.seen(prompts, logits_bv.shape[1])
    rows = torch.arange(len(logits_bv), device=logits_bv.device)
    rows = rows.repeat_interleave(beams.rules.num_beams)
    logits_bv, seen_bv = logits_bv[rows], None if seen_bv is None else seen_bv[rows]
    reader.follow(rows)
    while True:
        log_probs_bv = logits_bv.float().log_softmax(dim=-1)
        next_b, rows = beams.step(choice.penalised(log_probs_bv, seen_bv))
        if beams.is_over():
            return beams.best()
        if seen_bv is not None:
            seen_bv = seen_bv[rows].scatter(1, next_b[:, None], True)
        reader.follow(rows)
        logits_bv = reader.step(next_b)


class _Teller:
    """Passes tokens on to a function or to a streamer of transformers."""

    def __init__(self, streamer: Any, ids_bs: Tensor):
        self.streamer = streamer
        self.is_object = hasattr(streamer, "put")
        if self.is_object:
            streamer.put(ids_bs.cpu())

    def __call__(self, next_b: Tensor) -> None:
        if self.is_object:
            self.streamer.put(next_b.cpu())
        elif self.streamer is not None:
            self.streamer(next_b)

    def end(self) -> None:
        """There are no more."""
        if self.is_object:
            self.streamer.end()


@contextmanager
def _evaluating(model: "HybridForCausalLM") -> Iterator[None]:
    """Eval mode inside the block, whatever it was before and will be after."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _check_beams(do_sample: bool, streamer: object, stopping: Stopping) -> None:
    asked = {
        "do_sample": do_sample,
        "a streamer": streamer is not None,
        "stop_strings": bool(stopping.texts),
    }
    for name, is_asked in asked.items():
        if is_asked:
            raise HybridInputError(
                f"num_beams is above 1 and there is {name}: beams are neither drawn nor streamed, "
                "and end at eos_token_id only; leave one of them"
            )


def _check(
    model: "HybridForCausalLM", prompts: Prompts, max_new_tokens: int, chunk_size: int | None
) -> None:
    if model.embed_tokens is None or model.lm_head is None:
        raise HybridInputError("generate needs a whole model; this one is a pipeline stage")
    check_ids(prompts.ids, model.config.vocab_size)
    if max_new_tokens < 0:
        raise HybridInputError(f"max_new_tokens is {max_new_tokens}; it must be at least 0")
    if chunk_size is not None and chunk_size < 1:
        raise HybridInputError(
            f"prefill_chunk_size is {chunk_size}; it must be at least 1, or None for all at once"
        )
