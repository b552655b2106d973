from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fivefold.moe import MoEConfig, MoEForCausalLM
from fivefold.moe.errors import MoEInputError
from fivefold.moe.generate import filter_logits

Make = Callable[..., MoEConfig]


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("eos", [None, 5, (7, 11)])
def test_greedy_of_transformers(
    tiny: Make, oracle: Callable[..., Any], window: int | None, eos: int | None
) -> None:
    ours, theirs = oracle(tiny(sliding_window=window, eos_token_id=eos))
    x = torch.randint(48, (6, 5))
    pad = eos[0] if isinstance(eos, tuple) else eos
    wanted = theirs.generate(x, max_new_tokens=20, do_sample=False, pad_token_id=pad)
    assert torch.equal(ours.generate(x, 20), wanted)


def test_stops_when_every_sequence_has_ended(tiny: Make) -> None:
    model = MoEForCausalLM(tiny())
    x = torch.randint(48, (1, 5))
    free = model.generate(x, 12)[0]
    end = int(free[7])
    stop = free.tolist().index(end, 5)
    assert torch.equal(model.generate(x, 12, eos_token_id=end)[0], free[: stop + 1])
    assert torch.equal(model.generate(x, 12, eos_token_id=())[0], free)


def test_without_cache_it_is_the_same(tiny: Make) -> None:
    model = MoEForCausalLM(tiny()).eval()
    x = torch.randint(48, (3, 4))
    slow = x
    for _ in range(10):
        slow = torch.cat((slow, model(slow)[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(model.generate(x, 10), slow)
    assert torch.equal(model.generate(x, 0), x)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.7, None, None), (1.0, 5, None), (1.0, None, 0.6), (1.7, 9, 0.8), (1, 1, 1.0), (1, 99, 0.1)],
)
def test_filters_of_transformers(
    temperature: float, top_k: int | None, top_p: float | None
) -> None:
    logits = torch.randn(50, 48) * 2
    wanted = TemperatureLogitsWarper(float(temperature))(None, logits)
    if top_k is not None:
        wanted = TopKLogitsWarper(top_k)(None, wanted)
    if top_p is not None:
        wanted = TopPLogitsWarper(top_p)(None, wanted)
    torch.testing.assert_close(filter_logits(logits, temperature, top_k, top_p), wanted)


def test_sampling_follows_the_generator_and_the_probabilities(tiny: Make) -> None:
    model = MoEForCausalLM(tiny(initializer_range=0.05)).eval()
    x = torch.randint(48, (1, 4)).expand(4000, 4)

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(x, 1, do_sample=True, top_k=6, generator=generator)[:, -1]

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    wanted = filter_logits(model(x[:1])[:, -1], 1.0, 6, None).softmax(-1)[0].detach()
    found = draw(3).bincount(minlength=48) / 4000
    assert (found - wanted).abs().max() < 0.03
    assert ((found > 0) <= (wanted > 0)).all()


def test_streamer_and_modes(tiny: Make) -> None:
    model = MoEForCausalLM(tiny()).train()
    x = torch.randint(48, (2, 3))
    seen: list[Tensor] = []
    out = model.generate(x, 5, streamer=seen.append)
    assert torch.equal(torch.stack(seen, 1), out[:, 3:])
    assert model.training and not out.requires_grad
    assert model.side.totals == {}


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        ([[1, 48]], {}, "from 1 to 48; the vocabulary has ids 0 to 47"),
        ([[-1]], {}, "from -1 to -1"),
        ([1, 2], {}, r"shape \(2,\); it must be \(at least 1 sequence, at least 1 token\)"),
        ([[]], {}, r"shape \(1, 0\)"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens -1"),
        ([[1]], {"temperature": 0.0}, r"temperature 0\.0: it must be above 0"),
        ([[1]], {"top_k": 0}, "top_k 0"),
        ([[1]], {"top_p": 1.5}, r"top_p 1\.5: it must be in \(0, 1\]"),
    ],
)
def test_arguments_out_of_range(
    tiny: Make, x: list[Any], options: dict[str, Any], message: str
) -> None:
    model = MoEForCausalLM(tiny())
    with pytest.raises(MoEInputError, match=message):
        model.generate(torch.tensor(x, dtype=torch.int64), **({"max_new_tokens": 2} | options))


def test_a_stage_cannot_generate(tiny: Make) -> None:
    model = MoEForCausalLM(tiny())
    model.lm_head = None
    with pytest.raises(MoEInputError, match="pipeline stage"):
        model.generate(torch.tensor([[1]]), 2)


@pytest.mark.parametrize("length", [0, 3])
def test_no_sequences(tiny: Make, length: int) -> None:
    message = rf"input_ids has shape \(0, {length}\); it must be \(at least 1 sequence, "
    with pytest.raises(MoEInputError, match=message):
        MoEForCausalLM(tiny()).generate(torch.empty(0, length, dtype=torch.int64), 2)
