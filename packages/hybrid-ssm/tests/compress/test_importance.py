"""Scores by forward passes: planted truths, brute force, killed and resumed sums."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from fivefold.hybrid_ssm import HybridForCausalLM
from fivefold.hybrid_ssm.compress.config import ImportanceConfig
from fivefold.hybrid_ssm.compress.importance import (
    Scores,
    Sums,
    load_sums,
    over_batch,
    over_sequence,
    save_sums,
    score_pass,
)
from fivefold.hybrid_ssm.compress.prune import removal_order
from fivefold.hybrid_ssm.compress.stream import Stream
from fivefold.hybrid_ssm.memory import make_context

CONFIG = ImportanceConfig(mamba_heads=True)
IDS = torch.arange(4 * 12).view(4, 12) * 5 % 257


def score(folder: Path, config: ImportanceConfig = CONFIG, batches: int = 2) -> Scores:
    sums = Sums()
    with Stream(folder) as stream:
        for ids in IDS.chunk(batches):
            context = make_context((len(ids), ids.shape[1]))
            score_pass(stream, ids, context, sums, config, layers=True, neurons=True)
    assert (sums.layer_samples, sums.neuron_samples) == (4, 4)
    return sums.scores(config)


@torch.no_grad()
def hidden(model: HybridForCausalLM, without: int | None = None) -> torch.Tensor:
    """Before the output layer, with a layer left out of the module itself."""
    layers, head = model.layers, model.lm_head
    kept = {key: layer for key, layer in layers.items() if key != str(without)}
    model.layers, model.lm_head = nn.ModuleDict(kept), None
    out = model(IDS)
    model.layers, model.lm_head = layers, head
    return out


def brute_force(model: HybridForCausalLM) -> list[float]:
    whole = hidden(model)
    count = model.config.num_layers
    return [
        float((hidden(model, index) - whole).double().square().mean()) for index in range(count)
    ]


def test_layer_scores_are_those_of_single_removals(
    make_model: Callable[..., HybridForCausalLM], save: Callable[..., Path]
) -> None:
    model = make_model()
    expected = torch.tensor(brute_force(model), dtype=torch.float64)
    found = score(save(model)).layers
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-12)
    for letter in "M*-E":
        of_kind = [i for i, each in enumerate(model.config.pattern) if each == letter]
        by_hand = sorted(of_kind, key=lambda i: float(expected[i]))
        assert removal_order(model.config, found, letter) == by_hand


@pytest.mark.parametrize("wide", [False, True])
def test_a_layer_that_adds_nothing_scores_0_and_goes_first(
    wide: bool, make_model: Callable[..., HybridForCausalLM], save: Callable[..., Path]
) -> None:
    model = make_model(residual_in_fp32=wide)
    names = {0: "out_proj", 2: "o_proj", 3: "down_proj"}
    with torch.no_grad():
        for index, name in names.items():
            model.layers[str(index)].mixer.get_submodule(name).weight.zero_()
    layers = score(save(model)).layers
    zero = [index for index in range(7) if layers[index] == 0.0]
    assert zero == [0, 2, 3]
    assert removal_order(model.config, layers, "M")[0] == 0
    assert removal_order(model.config, layers, "-")[0] == 3


def test_dead_neurons_score_0(
    make_model: Callable[..., HybridForCausalLM], save: Callable[..., Path]
) -> None:
    model = make_model()
    with torch.no_grad():
        model.layers["1"].mixer.up_proj.weight[5] = 0.0
    scores = score(save(model))
    assert sorted(scores.neurons) == [1, 3, 5]
    assert scores.neurons[1][5] == 0.0 and int((scores.neurons[1] == 0).sum()) == 1
    assert all(int((scores.neurons[i] == 0).sum()) == 0 for i in (3, 5))


def test_neurons_heads_and_experts_by_hand(
    make_model: Callable[..., HybridForCausalLM], save: Callable[..., Path]
) -> None:
    model = make_model()
    taken: dict[str, torch.Tensor] = {}
    mixer = {index: model.layers[str(index)].mixer for index in (1, 0, 6)}
    mixer[1].down_proj.register_forward_pre_hook(lambda m, a: taken.update(act=a[0]))
    mixer[0].in_proj.register_forward_hook(lambda m, a, out: taken.update(x=out[1]))
    mixer[6].router.register_forward_hook(lambda m, a, out: taken.update(w=out[0], e=out[1]))
    with torch.no_grad():
        model(IDS)
    scores = score(save(model))
    per_sequence = taken["act"].double().abs().mean(1)
    torch.testing.assert_close(
        scores.neurons[1], per_sequence.square().sum(0).sqrt(), rtol=1e-6, atol=0
    )
    sizes = taken["x"].double().unflatten(-1, (4, 8)).norm(dim=-1).mean(1)
    torch.testing.assert_close(scores.heads[0], sizes.square().sum(0).sqrt(), rtol=1e-6, atol=0)
    load = torch.zeros(4, dtype=torch.float64)
    for weights, experts in zip(taken["w"], taken["e"], strict=True):
        for weight, expert in zip(weights.tolist(), experts.tolist(), strict=True):
            load[expert] += weight
    torch.testing.assert_close(scores.experts[6], load / IDS.numel(), rtol=1e-5, atol=0)


def test_both_aggregators() -> None:
    x = torch.tensor([[[3.0, -1.0], [-4.0, 1.0]]])
    assert over_sequence(x, "mean").tolist() == [[3.5, 1.0]]
    assert over_sequence(x, "l2").tolist() == [[5.0, 2**0.5]]
    y = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert over_batch(y, "mean").tolist() == [4.0, 6.0]
    assert over_batch(y, "l2").tolist() == [10.0, 20.0]
    sums = Sums({"layers": torch.ones(1), "neurons.0": torch.tensor([10.0, 20.0]).double()}, 1, 2)
    mean = sums.scores(ImportanceConfig(over_batch="mean")).neurons[0]
    assert mean.tolist() == [5.0, 10.0]
    assert sums.scores(ImportanceConfig()).neurons[0].tolist() == [10.0**0.5, 20.0**0.5]


def test_sums_survive_a_kill(
    make_model: Callable[..., HybridForCausalLM], save: Callable[..., Path], tmp_path: Path
) -> None:
    folder, path = save(make_model()), tmp_path / "sums.safetensors"
    expected = score(folder)
    assert load_sums(path).values == {}
    with Stream(folder) as stream:
        for ids in IDS.chunk(2):
            sums = load_sums(path)
            score_pass(stream, ids, make_context((2, 12)), sums, CONFIG, layers=True, neurons=True)
            save_sums(sums, path)
    found = load_sums(path).scores(CONFIG)
    assert torch.equal(found.layers, expected.layers)
    for kind in ("neurons", "heads", "experts"):
        mine, theirs = getattr(found, kind), getattr(expected, kind)
        assert mine.keys() == theirs.keys() != set()
        assert all(torch.equal(mine[index], theirs[index]) for index in mine)
