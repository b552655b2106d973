"""Generation against transformers', and its options."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import TextStreamer

from fivefold.hybrid_ssm import HybridCache, HybridForCausalLM
from fivefold.hybrid_ssm.errors import HybridInputError

from .conftest import tiny_config
from .test_model import tokens

Oracle = Callable[..., tuple[HybridForCausalLM, Any]]
GREEDY = {"do_sample": False, "max_new_tokens": 64, "eos_token_id": None, "pad_token_id": 0}


class Letters:
    """A tokenizer whose token i is the letter chr(33 + i)."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 33 for letter in text]

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(chr(33 + int(i)) for i in ids)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pattern": "M-M*-M-"},
        {"pattern": "MEM*E", "latent_size": 32},
        {"pattern": "M*M", "time_step_limit": (0.0, 0.8)},
        {"model_type": "mamba2", "pattern": "MMM"},
    ],
    ids=str,
)
def test_greedy_tokens_are_those_of_transformers(changes: dict[str, Any], oracle: Oracle) -> None:
    ours, theirs = oracle(tiny_config(**changes))
    ids = tokens(3, 19)
    expected = theirs.generate(ids, use_cache=False, **GREEDY)
    for options in ({}, {"use_cache": False}, {"prefill_chunk_size": 4}, {"prefill_chunk_size": 1}):
        assert torch.equal(ours.generate(ids, 64, **options), expected), options
    # Their decoding with a cache knows no limits of the time step.
    if "time_step_limit" not in changes:
        assert torch.equal(theirs.generate(ids, **GREEDY), expected)


def test_left_padded_greedy_tokens_are_those_of_transformers(oracle: Oracle) -> None:
    ours, theirs = oracle(tiny_config())
    ids, mask = tokens(3, 19), torch.ones(3, 19, dtype=torch.long)
    mask[0, :7], mask[2, :16] = 0, 0
    ids = ids * mask
    expected = theirs.generate(ids, attention_mask=mask, **GREEDY)
    for options in ({}, {"use_cache": False}, {"prefill_chunk_size": 5}):
        found = ours.generate(ids, 64, attention_mask=mask, **options)
        assert torch.equal(found, expected), options
    ragged = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
    assert torch.equal(ours.generate(ragged, 64), expected)
    for row, prompt in enumerate(ragged):
        alone = ours.generate([prompt], 64)[0, len(prompt) :]
        assert torch.equal(alone, expected[row, 19:])


def test_repetition_penalty_is_that_of_transformers(oracle: Oracle) -> None:
    ours, theirs = oracle(tiny_config(pattern="M-M*-"))
    ids = tokens(2, 9)
    expected = theirs.generate(ids, repetition_penalty=1.4, **GREEDY)
    assert torch.equal(ours.generate(ids, 64, repetition_penalty=1.4), expected)
    assert not torch.equal(ours.generate(ids, 64), expected)


def test_penalties_leave_padding_out(oracle: Oracle) -> None:
    ours, _ = oracle(tiny_config(pattern="M*"))
    prompt = tokens(1, 6)[0].tolist()
    alone = ours.generate([prompt], 20, repetition_penalty=1.5)[0, 6:]
    beside = ours.generate([prompt, prompt + prompt], 20, repetition_penalty=1.5)[0, 12:]
    assert torch.equal(alone, beside)


def test_sampling_follows_the_filtered_distribution(oracle: Oracle) -> None:
    ours, _ = oracle(tiny_config(pattern="M-"))
    ids = tokens(1, 5)
    with torch.no_grad():
        probabilities = (ours(ids)[0, -1] / 1.3).softmax(-1)
    best = probabilities.topk(6)
    wanted = torch.zeros(97)
    wanted[best.indices] = best.values / best.values.sum()
    found = ours.generate(
        ids.expand(20000, 5),
        1,
        do_sample=True,
        temperature=1.3,
        top_k=6,
        generator=torch.Generator().manual_seed(0),
    )[:, -1]
    counts = torch.bincount(found, minlength=97) / 20000
    assert (counts - wanted).abs().max() < 0.015
    nucleus = ours.generate(ids.expand(500, 5), 1, do_sample=True, top_p=0.3)[:, -1]
    ordered = ours_sorted = probabilities_of(ours, ids).sort(descending=True)
    num = int((ordered.values.cumsum(0) < 0.3).sum()) + 1
    assert set(nucleus.tolist()) <= set(ours_sorted.indices[:num].tolist())


@torch.no_grad()
def probabilities_of(model: HybridForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    return model(ids)[0, -1].softmax(-1)


def test_the_same_seed_draws_the_same(oracle: Oracle) -> None:
    ours, _ = oracle(tiny_config(pattern="M*"))
    ids = tokens(2, 5)
    drawn = [
        ours.generate(ids, 20, do_sample=True, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_ended_sequences_are_filled_up(oracle: Oracle) -> None:
    ours, theirs = oracle(tiny_config(pattern="M-M*-"))
    ids = tokens(3, 9)
    free = ours.generate(ids, 12)
    ends = [int(free[0, 11]), int(free[1, 14])]
    options = {**GREEDY, "max_new_tokens": 12, "eos_token_id": ends}
    expected = theirs.generate(ids, **options)
    found = ours.generate(ids, 12, eos_token_id=ends, pad_token_id=0)
    assert torch.equal(found, expected)
    assert (found == 0).any()
    one = ours.generate(ids[:1], 12, eos_token_id=ends[0])
    assert one.shape[1] < 21 and int(one[0, -1]) == ends[0]


def test_stop_strings_end_a_sequence(oracle: Oracle) -> None:
    ours, _ = oracle(tiny_config(pattern="M-M*-"))
    ids, letters = tokens(2, 9), Letters()
    free = ours.generate(ids, 40)
    text = letters.decode(free[0, 9:])
    stop = text[11:14]
    first = text.index(stop) + 3
    found = ours.generate(ids, 40, stop_strings=[stop, "no such"], tokenizer=letters)
    assert letters.decode(found[0, 9 : 9 + first]) == text[:first]
    assert (found[0, 9 + first :] == 0).all()
    other = letters.decode(free[1, 9:])
    kept = other[: other.index(stop) + 3] if stop in other else other
    assert letters.decode(found[1, 9:]).startswith(kept)
    alone = ours.generate(ids[:1], 40, stop_strings=stop, tokenizer=letters)
    assert alone.shape[1] == 9 + first


def test_streamers_hear_every_token(oracle: Oracle, capsys: pytest.CaptureFixture[str]) -> None:
    ours, _ = oracle(tiny_config(pattern="M*"))
    ids = tokens(1, 5)
    heard: list[int] = []
    found = ours.generate(ids, 9, streamer=lambda next_b: heard.append(int(next_b[0])))
    assert heard == found[0, 5:].tolist()
    ours.generate(ids, 9, streamer=TextStreamer(Letters()))  # type: ignore[arg-type]
    assert capsys.readouterr().out.strip() == Letters().decode(found[0])


def test_the_mode_stays_what_it_was(oracle: Oracle) -> None:
    ours, _ = oracle(tiny_config(pattern="ME"))
    for training in (True, False):
        ours.train(training)
        ours.generate(tokens(1, 3), 2)
        assert ours.training == training


def test_no_new_tokens_are_the_prompt(oracle: Oracle) -> None:
    ours, _ = oracle(tiny_config(pattern="M"))
    ids = tokens(2, 3)
    assert torch.equal(ours.generate(ids, 0), ids)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens is -1"),
        ([[1]], {"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ([[1]], {"top_k": 0}, "top_k is 0; it must be at least 1, or None"),
        ([[1]], {"top_p": 1.5}, r"top_p is 1.5; it must be in \(0, 1\], or None"),
        ([[1]], {"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ([[1]], {"prefill_chunk_size": 0}, "prefill_chunk_size is 0"),
        ([[1, 97]], {}, "input_ids are from 1 to 97; the vocabulary has ids 0 to 96"),
        ([[1], []], {}, r"prompts of \[1, 0\] tokens"),
        ([], {}, r"prompts of \[\] tokens"),
        (torch.ones(2, 0, dtype=torch.long), {}, r"input_ids has shape \(2, 0\)"),
        ([[1]], {"attention_mask": torch.ones(1, 1)}, "attention_mask belongs to a tensor"),
        (
            torch.ones(1, 3, dtype=torch.long),
            {"attention_mask": torch.tensor([[1, 1, 0]])},
            "padding after a token; pad prompts on the left",
        ),
        (
            torch.ones(1, 3, dtype=torch.long),
            {"attention_mask": torch.tensor([[0, 1]])},
            r"attention_mask has shape \(1, 2\) and input_ids \(1, 3\)",
        ),
        ([[1]], {"stop_strings": "x"}, "stop_strings need a tokenizer"),
        ([[1]], {"stop_strings": "", "tokenizer": Letters()}, "an empty text"),
        (
            [[1]],
            {"use_cache": False, "past_key_values": HybridCache(9)},
            "past_key_values came with use_cache=False",
        ),
        (
            [[1, 2]],
            {"past_key_values": HybridCache(5)},
            r"room for 5 tokens; .* need 6: fork\(max_length=6\) makes room",
        ),
    ],
)
def test_arguments_out_of_range_are_named(
    ids: Any, options: dict[str, Any], message: str, oracle: Oracle
) -> None:
    ours, _ = oracle(tiny_config(pattern="M*"))
    with pytest.raises(HybridInputError, match=message):
        ours.generate(ids, **{"max_new_tokens": 4, **options})


def test_a_full_cache_and_a_stage_are_refused(oracle: Oracle) -> None:
    ours, _ = oracle(tiny_config(pattern="M*"))
    cache = HybridCache(20)
    with torch.no_grad():
        ours(tokens(1, 4), cache)
    with pytest.raises(HybridInputError, match="holds 4 tokens and the prompts have 4; at least"):
        ours.generate(tokens(1, 4), 2, past_key_values=cache)
    ours.embed_tokens = None
    with pytest.raises(HybridInputError, match="needs a whole model"):
        ours.generate(tokens(1, 4), 2)
