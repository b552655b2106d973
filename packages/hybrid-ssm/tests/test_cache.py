"""The memory of a model: size, snapshots, branches."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fivefold.hybrid_ssm import HybridCache, HybridConfig, HybridForCausalLM
from fivefold.hybrid_ssm.errors import HybridInputError

from .conftest import tiny_config
from .test_model import tokens

Make = Callable[..., HybridConfig]
Oracle = Callable[..., tuple[HybridForCausalLM, Any]]
CLOSE = {"rtol": 0, "atol": 2e-5}


@pytest.mark.parametrize(
    ("pattern", "slope"),
    # Two of keys and values, of 2 heads of 16 in 4 bytes, for each attention layer.
    [("M-M*-", 256), ("*M*", 512), ("M-M-", 0), ("MEM*E*", 512)],
)
@torch.no_grad()
def test_bytes_grow_by_the_keys_and_values_alone(pattern: str, slope: int, tiny: Make) -> None:
    config = tiny(pattern=pattern)
    model = HybridForCausalLM(config).eval()
    num_mamba = pattern.count("M")
    # States of 8 heads of 16 by 16, and 3 inputs of 128 + 2 * 32 channels.
    states = num_mamba * 4 * (8 * 16 * 16 + 3 * (128 + 2 * 32))
    for length in (64, 128, 256):
        cache = HybridCache(length)
        model(tokens(1, length), cache)
        size = cache.num_bytes()
        assert (size.states, size.keys_values) == (states, slope * length)


@torch.no_grad()
def test_states_of_narrow_models_are_float32(tiny: Make) -> None:
    model = HybridForCausalLM(tiny(pattern="M*")).to(torch.bfloat16).eval()
    cache = HybridCache(8)
    for part in tokens(1, 8).split((5, 1, 1, 1), dim=1):
        model(part, cache)
    state, kept = cache.states["0"], cache.attention["1"]
    assert state.ssm is not None and state.ssm.dtype == torch.float32
    assert state.conv is not None and state.conv.dtype == torch.bfloat16
    assert kept.keys is not None and kept.keys.dtype == torch.bfloat16


@torch.no_grad()
def test_rolling_back_is_as_if_nothing_had_been(oracle: Oracle) -> None:
    model, _ = oracle(tiny_config())
    ids, other = tokens(2, 20), tokens(2, 20, seed=2)
    expected = model(torch.cat((ids[:, :9], other[:, 9:]), dim=1))
    cache = HybridCache(20)
    model(ids[:, :9], cache)
    point = cache.snapshot()
    for _ in range(2):  # a point may be gone back to again
        for i in range(9, 16):
            model(ids[:, i : i + 1], cache)
        cache.rollback(point)
        assert cache.length == 9
    found = torch.cat([model(other[:, i : i + 1], cache) for i in range(9, 20)], dim=1)
    torch.testing.assert_close(found, expected[:, 9:], **CLOSE)


@torch.no_grad()
def test_snapshots_of_branches_that_were_left_are_refused(tiny: Make) -> None:
    model = HybridForCausalLM(tiny(pattern="M*")).eval()
    cache, other = HybridCache(12), HybridCache(12)
    model(tokens(1, 3), cache)
    first = cache.snapshot()
    model(tokens(1, 3), cache)
    second = cache.snapshot()
    cache.rollback(second)
    cache.rollback(first)
    with pytest.raises(HybridInputError, match="after 6 tokens, is not of this cache's history"):
        cache.rollback(second)
    with pytest.raises(HybridInputError, match="another cache's"):
        other.rollback(first)
    cache.rollback(first)


@torch.no_grad()
def test_a_snapshot_costs_a_copy_of_the_states_whatever_the_length(tiny: Make) -> None:
    model = HybridForCausalLM(tiny(pattern="M*")).eval()
    sizes = []
    for length in (16, 160):
        cache = HybridCache(length)
        model(tokens(1, length), cache)
        states = cache.snapshot().states
        held = [tensor for pair in states.values() for tensor in pair if tensor is not None]
        sizes.append(sum(tensor.numel() for tensor in held))
    assert sizes[0] == sizes[1] == 8 * 16 * 16 + 3 * (128 + 2 * 32)


@torch.no_grad()
def test_forks_go_their_own_ways(oracle: Oracle) -> None:
    model, _ = oracle(tiny_config())
    ids, other = tokens(2, 16), tokens(2, 16, seed=2)
    cache = HybridCache(10)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[0, :3] = False
    model(ids[:, :10], cache, attention_mask=mask)
    branch = cache.fork(max_length=16)
    swapped = cache.fork(max_length=16, rows=torch.tensor([1, 0, 1]))
    with pytest.raises(HybridInputError, match="room for 10 tokens and holds 10"):
        model(ids[:, 10:], cache)
    found = torch.cat([model(other[:, i : i + 1], branch) for i in range(10, 16)], dim=1)
    padded = torch.cat((mask, torch.ones(2, 6, dtype=torch.bool)), dim=1)
    joined = torch.cat((ids[:, :10], other[:, 10:]), dim=1)
    torch.testing.assert_close(found, model(joined, attention_mask=padded)[:, 10:], **CLOSE)
    rows = model(other[[1, 0, 1], 10:], swapped)
    torch.testing.assert_close(rows, found[[1, 0, 1]], **CLOSE)


@torch.no_grad()
def test_without_attention_there_is_always_room(tiny: Make) -> None:
    model = HybridForCausalLM(tiny(pattern="M-")).eval()
    cache = HybridCache(4)
    model(tokens(1, 30), cache)
    assert cache.length == 30
    assert cache.fork(max_length=1).length == 30


def test_what_cannot_be_is_refused(tiny: Make) -> None:
    with pytest.raises(HybridInputError, match="max_length is 0"):
        HybridCache(0)
    model = HybridForCausalLM(tiny(pattern="M*")).eval()
    cache = HybridCache(8)
    with torch.no_grad():
        model(tokens(1, 8), cache)
    with pytest.raises(HybridInputError, match="max_length=7 is less than the 8 tokens"):
        cache.fork(max_length=7)


def test_gradients_flow_through_states(oracle: Oracle) -> None:
    """Training may go on from a state: one token at a time gives the same gradients."""
    model, _ = oracle(tiny_config(pattern="M-M"), torch.float64)
    ids, slope = tokens(2, 9), torch.randn(2, 9, 97, dtype=torch.float64)
    (model(ids) * slope).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    cache = HybridCache(9)
    parts = [model(ids[:, i : i + 1], cache) for i in range(9)]
    (torch.cat(parts, dim=1) * slope).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-9)
