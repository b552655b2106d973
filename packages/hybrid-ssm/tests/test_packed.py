"""A packed prefill leaves the cache that padding on the left would."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fivefold.hybrid_ssm import HybridCache, HybridConfig, HybridForCausalLM
from fivefold.hybrid_ssm.errors import HybridInputError
from fivefold.hybrid_ssm.packed import Packed

LENGTHS = [7, 1, 12, 3, 2]
ROOM = 40
Make = Callable[..., HybridConfig]


def documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 97, (length,), generator=generator) for length in LENGTHS]


def packed_rows() -> tuple[Tensor, Tensor]:
    """Two rows: three documents and padding-free two, the last made up by a sixth."""
    parts = documents()
    sixth = torch.arange(15) + 5
    rows = [torch.cat(parts[:3]), torch.cat([*parts[3:], sixth])]
    ids = [[0] * 7 + [1] + [2] * 12, [0] * 3 + [1] * 2 + [2] * 15]
    return torch.stack(rows), torch.tensor(ids)


@pytest.fixture
def model(tiny: Make) -> HybridForCausalLM:
    model = HybridForCausalLM(tiny(pattern="M-M*ME*M", initializer_range=0.2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.05
    return model.double().eval()


@torch.no_grad()
def test_each_document_goes_on_as_if_alone(model: HybridForCausalLM) -> None:
    ids, seq_ids = packed_rows()
    cache = HybridCache(ROOM)
    logits = model(ids, cache, seq_ids=seq_ids, logits_to_keep=1)
    assert logits.shape == (6, 1, 97) and cache.length == 15
    singles = [*documents(), torch.arange(15) + 5]
    following = torch.arange(24).view(6, 4) + 30
    found = torch.cat((logits, model(following[:, :1], cache), model(following[:, 1:], cache)), 1)
    for row, (single, after) in enumerate(zip(singles, following, strict=True)):
        alone = model(torch.cat((single, after))[None])[:, len(single) - 1 :]
        torch.testing.assert_close(found[row : row + 1], alone, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_the_cache_is_that_of_padding_on_the_left(model: HybridForCausalLM) -> None:
    ids, seq_ids = packed_rows()
    packed, padded = HybridCache(ROOM), HybridCache(ROOM)
    everything = model(ids, packed, seq_ids=seq_ids)
    torch.testing.assert_close(everything, model(ids, seq_ids=seq_ids), rtol=1e-9, atol=1e-9)
    singles = [*documents(), torch.arange(15) + 5]
    rows = torch.stack([torch.cat((d.new_zeros(15 - len(d)), d)) for d in singles])
    mask = torch.tensor([[0] * (15 - len(d)) + [1] * len(d) for d in singles])
    model(rows, padded, attention_mask=mask)
    assert torch.equal(packed.key_mask[:, :15], padded.key_mask[:, :15])
    for name, state in packed.states.items():
        other = padded.state(name)
        torch.testing.assert_close(state.ssm, other.ssm, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(state.conv, other.conv, rtol=1e-9, atol=1e-9)
    for name, kept in packed.attention.items():
        for found, expected in ((kept.keys, padded.attention[name].keys),):
            seen = mask.bool()
            torch.testing.assert_close(found[:, :15][seen], expected[:, :15][seen])


@torch.no_grad()
def test_models_without_attention(tiny: Make) -> None:
    model = HybridForCausalLM(tiny(pattern="MM", initializer_range=0.2)).double().eval()
    ids, seq_ids = packed_rows()
    cache = HybridCache(1)  # states need no room
    model(ids, cache, seq_ids=seq_ids, logits_to_keep=1)
    again = model(torch.full((6, 1), 9), cache)
    alone = model(torch.cat((documents()[4], torch.tensor([9])))[None])[:, -1]
    torch.testing.assert_close(again[4], alone, rtol=1e-9, atol=1e-9)


def test_ragged_prompts_are_read_without_their_padding(
    model: HybridForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [document.tolist() for document in documents()]
    read: list[int] = []
    forward = model.forward

    def watched(x: Tensor, *rest: Any, **named: Any) -> Tensor:
        read.append(x.numel())
        return forward(x, *rest, **named)

    monkeypatch.setattr(model, "forward", watched)
    together = model.generate(prompts, 6)
    assert read[0] == sum(LENGTHS) and set(read[1:]) == {len(LENGTHS)}
    read.clear()
    chunked = model.generate(prompts, 6, prefill_chunk_size=5)
    assert read[0] == 5 * len(LENGTHS), "too many to be read at once"
    assert torch.equal(together, chunked)
    for row, prompt in enumerate(prompts):
        alone = model.generate([prompt], 6)[0, len(prompt) :]
        assert torch.equal(together[row, -6:], alone)


def test_what_cannot_be_packed(model: HybridForCausalLM) -> None:
    ids, seq_ids = packed_rows()
    cache = HybridCache(ROOM)
    model(ids[:, :3], cache)
    with pytest.raises(HybridInputError, match=r"a cache of 3 tokens; pack .* into an empty cache"):
        model(ids, cache, seq_ids=seq_ids)
    with pytest.raises(HybridInputError, match=r"documents have \[7, 1, 12, 3, 2, 15\] tokens"):
        model(ids, HybridCache(ROOM), seq_ids=seq_ids, logits_to_keep=2)
    with pytest.raises(HybridInputError, match=r"room for 14 tokens .* max_length=15 or more"):
        model(ids, HybridCache(14), seq_ids=seq_ids)


def test_spans() -> None:
    packed = Packed.of(torch.tensor([[4, 4, 4, 1], [1, 2, 2, 2], [3, 3, 3, 3]]))
    assert packed.spans == ((0, 0, 3), (0, 3, 4), (1, 0, 1), (1, 1, 4), (2, 0, 4))
    x = torch.arange(24).view(3, 4, 2)
    assert torch.equal(packed.join(packed.cut(x), 3), x)
    assert packed.aligned(x, 2)[:, 0, 0].tolist() == [2, 0, 0, 12, 20]
    assert Packed.of(torch.zeros(2, 3)).mask(torch.device("cpu")) is None
