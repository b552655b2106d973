"""The model against transformers' Nemotron-H and Mamba-2, and against a plain recurrence."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fivefold.hybrid_ssm import HybridCache, HybridForCausalLM
from fivefold.hybrid_ssm.errors import HybridInputError

from .conftest import tiny_config
from .recurrence import logits_by_recurrence

CHUNK = 8
LENGTHS = (1, 2, 3, 4, 5, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7)
PATTERNS: dict[str, dict[str, Any]] = {
    "every kind": {},
    "one Mamba": {"pattern": "M"},
    "no attention": {"pattern": "M-M-"},
    "one attention": {"pattern": "*"},
    "attention first": {"pattern": "*M-*M"},
    "as the 8B": {"pattern": "M-M-M-M*-M-M-M-"},
    "runs as in the 47B": {"pattern": "M*-M---MM---M-M*-"},
    "experts": {"pattern": "MEMEM*EME"},
    "latent experts": {"pattern": "ME*E", "latent_size": 32},
    "groups of experts": {
        "pattern": "ME-E",
        "num_experts": 12,
        "num_expert_groups": 4,
        "num_chosen_groups": 2,
        "num_experts_per_token": 3,
        "routed_scaling_factor": 2.5,
    },
    "weights not normalised": {"pattern": "MEM", "normalise_weights": False},
    "one group": {"pattern": "MM-", "num_groups": 1},
    "eight groups": {"pattern": "M*M", "num_groups": 8},
    "heads of 80": {"pattern": "M*M", "num_mamba_heads": 4, "mamba_head_dim": 80},
    "states of 128": {"pattern": "M*-M", "state_size": 128},
    "width no multiple": {"pattern": "M*-M", "num_mamba_heads": 6, "mamba_head_dim": 17},
    "head dim its own": {"pattern": "*M*", "head_dim": 24},
    "biases": {"pattern": "M-E*", "use_bias": True, "mlp_bias": True, "latent_size": 16},
    "no bias of the convolution": {"pattern": "M-M", "use_conv_bias": False},
    "two taps": {"pattern": "MM", "conv_width": 2},
    "limited time steps": {"pattern": "M*-M", "time_step_limit": (0.05, 0.4)},
    "mamba2": {"model_type": "mamba2", "pattern": "MMM", "residual_in_fp32": True},
    "mamba2 tied": {"model_type": "mamba2", "pattern": "MM", "tie_word_embeddings": True},
}

Oracle = Callable[..., tuple[HybridForCausalLM, Any]]


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 97, (batch, length), generator=generator)


@pytest.mark.parametrize("name", PATTERNS)
@torch.no_grad()
def test_logits_are_those_of_transformers(name: str, oracle: Oracle) -> None:
    ours, theirs = oracle(tiny_config(**PATTERNS[name]))
    largest = 0.0
    for length in LENGTHS:
        ids = tokens(1 if length == CHUNK + 1 else 3, length)
        expected = theirs(ids, use_cache=False).logits
        largest = max(largest, float(expected.abs().max()))
        torch.testing.assert_close(ours(ids), expected, rtol=0, atol=2e-5)
    assert 2 < largest < 10


@torch.no_grad()
def test_long_sequences_are_those_of_transformers(oracle: Oracle) -> None:
    """Beyond the blocks in which the kernels take tokens together."""
    ours, theirs = oracle(tiny_config(pattern="M*M-"))
    for length in (63, 64, 65, 200, 391):
        ids = tokens(2, length)
        expected = theirs(ids, use_cache=False).logits
        torch.testing.assert_close(ours(ids), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "name",
    ["every kind", "groups of experts", "latent experts", "limited time steps", "one group"],
)
@torch.no_grad()
def test_logits_are_those_of_the_recurrence(name: str, oracle: Oracle, tmp_path: Path) -> None:
    config = tiny_config(**PATTERNS[name])
    ours, _ = oracle(config, torch.float64)
    stored = load_file(tmp_path / "oracle" / "model.safetensors")
    ids = tokens(2, 3 * CHUNK + 7)
    for row, found in zip(ids.tolist(), ours(ids), strict=True):
        expected = logits_by_recurrence(config, stored, row)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("parameter", ["A_log", "dt_bias", "D", "conv_b.weight", "norm.weight"])
@torch.no_grad()
def test_every_part_of_the_scan_shows_in_the_logits(parameter: str, oracle: Oracle) -> None:
    """The equalities above would see a scan that takes one of its inputs for a constant."""
    ours, theirs = oracle(tiny_config(pattern="M-M*-"))
    ids = tokens(1, 3 * CHUNK)
    expected = theirs(ids, use_cache=False).logits
    for name, values in ours.named_parameters():
        if name.endswith((f"heads.{parameter}", f"mixer.{parameter}")):
            values.fill_(float(values.mean()))
    assert (ours(ids) - expected).abs().max() > 0.2


@pytest.mark.parametrize("name", ["every kind", "no attention", "limited time steps", "mamba2"])
@torch.no_grad()
def test_a_cache_changes_nothing(name: str, oracle: Oracle) -> None:
    ours, _ = oracle(tiny_config(**PATTERNS[name]))
    ids = tokens(2, 37)
    expected = ours(ids)
    for borders in ([0, 1, 2, 3, 37], [0, 8, 9, 30, 37], [0, 30, *range(31, 38)], [0, 3, 4, 37]):
        cache = HybridCache(37)
        parts = [ours(ids[:, a:b], cache) for a, b in itertools.pairwise(borders)]
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=2e-5)
        assert cache.length == 37


@torch.no_grad()
def test_limits_of_the_time_step_hold_in_prefill_and_in_decoding(oracle: Oracle) -> None:
    """Where every step is at a limit, the logits do not depend on what the steps would be."""
    config = tiny_config(pattern="MM", time_step_limit=(0.0, 1e-3))
    ours, _ = oracle(config)
    ids = tokens(1, 12)
    logits = []
    for bias in (3.0, 5.0):
        for name, values in ours.named_parameters():
            if name.endswith("dt_bias"):
                values.fill_(bias)
        cache = HybridCache(12)
        parts = [ours(ids[:, :6], cache), *(ours(ids[:, i : i + 1], cache) for i in range(6, 12))]
        logits.append(torch.cat(parts, dim=1))
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-6)


@torch.no_grad()
def test_padding_on_either_side_changes_nothing(oracle: Oracle) -> None:
    ours, theirs = oracle(tiny_config())
    ids, mask = tokens(3, 13), torch.ones(3, 13, dtype=torch.long)
    mask[0, :5], mask[1, 11:] = 0, 0
    found = ours(ids, attention_mask=mask)
    for row, (first, last) in enumerate([(5, 13), (0, 11), (0, 13)]):
        alone = ours(ids[row : row + 1, first:last])[0]
        torch.testing.assert_close(found[row, first:last], alone, rtol=0, atol=2e-5)
    expected = theirs(ids, attention_mask=mask, use_cache=False).logits
    real = mask.bool()
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=2e-5)


@pytest.mark.parametrize("use_bias", [False, True])
@torch.no_grad()
def test_padding_may_come_in_parts(use_bias: bool, oracle: Oracle) -> None:
    """A border of a part inside the padding, at its end, and after it."""
    ours, _ = oracle(tiny_config(pattern="M*M", use_bias=use_bias))
    ids, mask = tokens(2, 13), torch.ones(2, 13, dtype=torch.bool)
    mask[0, :5] = False
    alone = ours(ids[:1, 5:])[0]
    for border in (1, 3, 5, 6):
        cache = HybridCache(13)
        first = ours(ids[:, :border], cache, attention_mask=mask[:, :border])
        rest = ours(ids[:, border:], cache, attention_mask=mask[:, border:])
        both = torch.cat((first, rest), dim=1)
        torch.testing.assert_close(both[0, 5:], alone, rtol=0, atol=2e-5)
        torch.testing.assert_close(both[1], ours(ids[1:])[0], rtol=0, atol=2e-5)


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(oracle: Oracle) -> None:
    ours, _ = oracle(tiny_config())
    ids = tokens(3, 24)
    documents = [[0] * 24, [5] * 7 + [3] * 1 + [9] * 16, [2] * 7 + [1] + [2] * 16]
    found = ours(ids, seq_ids=torch.tensor(documents))
    for row, borders in enumerate([(0, 24), (0, 7, 8, 24), (0, 7, 8, 24)]):
        for first, last in itertools.pairwise(borders):
            alone = ours(ids[row : row + 1, first:last])[0]
            torch.testing.assert_close(found[row, first:last], alone, rtol=0, atol=2e-5)


def test_gradients_are_those_of_transformers(oracle: Oracle, tmp_path: Path) -> None:
    for name in ("every kind", "latent experts", "limited time steps", "biases"):
        ours, theirs = oracle(tiny_config(**PATTERNS[name]))
        ids = tokens(2, 3 * CHUNK + 7)
        slope = torch.randn(2, 3 * CHUNK + 7, 97)
        (theirs(ids, use_cache=False).logits * slope).sum().backward()
        (ours(ids) * slope).sum().backward()
        # Carried over to a second model of ours through the files, where the names are matched.
        with torch.no_grad():
            for parameter in theirs.parameters():
                grad = parameter.grad
                parameter.copy_(torch.zeros_like(parameter) if grad is None else grad)
        theirs.save_pretrained(tmp_path / "gradients")
        expected = HybridForCausalLM.from_pretrained(tmp_path / "gradients")
        wanted = dict(expected.named_parameters())
        for key, parameter in ours.named_parameters():
            if not parameter.requires_grad:
                continue
            assert parameter.grad is not None, key
            error = (parameter.grad - wanted[key]).abs().max() / wanted[key].abs().max()
            assert error < 1e-4, (name, key)


@torch.no_grad()
def test_logits_to_keep_are_the_last(oracle: Oracle) -> None:
    ours, _ = oracle(tiny_config())
    ids = tokens(2, 9)
    assert torch.equal(ours(ids, logits_to_keep=2), ours(ids)[:, -2:])


@torch.no_grad()
def test_bfloat16_is_near(oracle: Oracle) -> None:
    ours, _ = oracle(tiny_config(pattern="M-M*-M-"))
    ids = tokens(2, 31)
    expected = ours(ids)
    found = ours.to(torch.bfloat16)(ids)
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().mean() < 0.02 * expected.abs().mean() + 0.01
    kept = {n for n, p in ours.named_parameters() if p.dtype == torch.float32}
    assert {name.rpartition(".")[2] for name in kept} == {"A_log", "D", "dt_bias"}


@torch.no_grad()
def test_a_wide_residual_is_float32(oracle: Oracle) -> None:
    ours, theirs = oracle(
        tiny_config(model_type="mamba2", pattern="MMM", residual_in_fp32=True), torch.bfloat16
    )
    seen = []
    ours.layers["1"].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    ids = tokens(2, 31)
    found, expected = ours(ids).float(), theirs(ids, use_cache=False).logits
    assert seen == [torch.float32]
    assert (found - expected).abs().mean() < 0.03 * expected.abs().mean()


@torch.no_grad()
def test_what_heads_keep_follows_their_parameters(oracle: Oracle) -> None:
    """Values of heads are kept between calls without gradients, and made anew when one changes."""
    ours, theirs = oracle(tiny_config(pattern="M-M"))
    ids = tokens(1, 9)
    first = ours(ids)
    assert torch.equal(ours(ids), first)
    for name, parameter in ours.named_parameters():
        if name.endswith("A_log"):
            parameter.add_(0.5)
    changed = ours(ids)
    assert (changed - first).abs().max() > 1e-3
    for module in theirs.modules():
        if hasattr(module, "A_log"):
            module.A_log.add_(0.5)
    expected = theirs(ids, use_cache=False).logits
    torch.testing.assert_close(changed, expected, rtol=0, atol=2e-5)
    ours.double()
    torch.testing.assert_close(ours(ids).float(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask has shape \(1, 3\); .* \(2, 4\)$"),
        (
            {"seq_ids": torch.ones(2, 5, dtype=torch.long)},
            r"seq_ids are torch.int64 of shape \(2, 5\); they must be .* \(2, 4\)$",
        ),
        (
            {"seq_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.ones(2, 4)},
            "several documents in a row came together with an attention_mask",
        ),
        ({"cache": HybridCache(3)}, "room for 3 tokens and holds 0; 4 more do not fit; .*=4"),
    ],
)
def test_what_does_not_fit_is_refused(
    options: dict[str, Any], message: str, oracle: Oracle
) -> None:
    ours, _ = oracle(tiny_config(pattern="M*"))
    with pytest.raises(HybridInputError, match=message):
        ours(tokens(2, 4), **options)
