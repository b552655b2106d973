"""Beam search against transformers'."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fivefold.hybrid_ssm import HybridCache, HybridForCausalLM
from fivefold.hybrid_ssm.errors import HybridInputError

from .conftest import tiny_config
from .test_model import tokens

Oracle = Callable[..., tuple[HybridForCausalLM, Any]]


@pytest.fixture
def pair(oracle: Oracle) -> tuple[HybridForCausalLM, Any]:
    return oracle(tiny_config(pattern="M*-M", vocab_size=23))


@pytest.mark.parametrize(
    ("early_stopping", "length_penalty", "ends"),
    [
        (False, 1.0, [3, 5, 11, 17]),
        (True, 1.0, [3, 5, 11, 17]),
        ("never", 1.0, [3]),
        ("never", 3.0, [3, 5, 11, 17]),
        (False, 0.0, [3]),
        (True, -2.0, [3, 5, 11, 17]),
        (False, 1.0, []),
    ],
    ids=str,
)
def test_texts_are_those_of_transformers(
    early_stopping: Any, length_penalty: float, ends: list[int], pair: Any
) -> None:
    ours, theirs = pair
    ids = tokens(3, 7) % 23
    options = {
        "num_beams": 4,
        "length_penalty": length_penalty,
        "early_stopping": early_stopping,
        "max_new_tokens": 12,
    }
    expected = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        use_cache=False,
        eos_token_id=ends or None,
        pad_token_id=1,
        **options,
    )
    found = ours.generate(ids, eos_token_id=ends, pad_token_id=1, **options)
    assert torch.equal(found, expected)
    assert not torch.equal(found, ours.generate(ids, 12, eos_token_id=ends, pad_token_id=1))


def test_with_padding_penalty_and_without_a_cache(pair: Any) -> None:
    ours, theirs = pair
    ids, mask = tokens(2, 9) % 23, torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    # Their penalty takes padding for a token that was there: one that is.
    ids[0, :4] = ids[0, 4]
    options = {"num_beams": 3, "repetition_penalty": 1.3, "max_new_tokens": 10}
    expected = theirs.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        use_cache=False,
        eos_token_id=4,
        pad_token_id=1,
        **options,
    )
    for more in ({}, {"use_cache": False}, {"prefill_chunk_size": 2}):
        found = ours.generate(
            ids, attention_mask=mask, eos_token_id=4, pad_token_id=1, **options, **more
        )
        assert torch.equal(found, expected), more


def test_beams_find_what_is_at_least_as_likely(pair: Any) -> None:
    ours, _ = pair
    ids = tokens(4, 6) % 23

    def log_prob(texts: torch.Tensor) -> torch.Tensor:
        logits = ours(texts)[:, 5:-1].log_softmax(-1)
        return logits.gather(2, texts[:, 6:, None]).sum((1, 2))

    greedy = log_prob(ours.generate(ids, 8, eos_token_id=[]))
    # As many beams as there are texts of one token: two tokens are searched through.
    searched = log_prob(ours.generate(ids, 8, eos_token_id=[], num_beams=23))
    assert (searched >= greedy - 1e-5).all() and (searched > greedy + 1e-3).any()


def test_a_given_cache_keeps_the_prompt(pair: Any) -> None:
    ours, _ = pair
    ids, cache = tokens(2, 6) % 23, HybridCache(16)
    ours(ids[:, :4], cache)
    options = {"num_beams": 3, "eos_token_id": []}
    found = ours.generate(ids, 5, past_key_values=cache, **options)
    assert torch.equal(found, ours.generate(ids, 5, **options))
    assert cache.length == 6
    assert torch.equal(ours.generate(ids, 0, num_beams=2), ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "at least 1"),
        ({"num_beams": 2, "early_stopping": "soon"}, "'soon'"),
        ({"num_beams": 2, "do_sample": True}, "do_sample"),
        ({"num_beams": 2, "streamer": print}, "a streamer"),
    ],
)
def test_what_cannot_be_searched_is_named(options: dict[str, Any], message: str) -> None:
    model = HybridForCausalLM(tiny_config(pattern="M", vocab_size=23))
    with pytest.raises(HybridInputError, match=message):
        model.generate(torch.ones(1, 3, dtype=torch.long), 4, **options)
