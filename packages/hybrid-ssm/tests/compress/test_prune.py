"""Cut weights: what goes changes nothing where it did nothing, and what stays is the parent's."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fivefold.hybrid_ssm import HybridForCausalLM
from fivefold.hybrid_ssm.compress.importance import Scores
from fivefold.hybrid_ssm.compress.prune import (
    Candidate,
    best,
    best_in_groups,
    best_layers,
    counts_of,
    pruned_config,
    random_scores,
    removal_order,
    whole,
)
from fivefold.hybrid_ssm.compress.student import write_student
from fivefold.hybrid_ssm.errors import HybridConfigError
from fivefold.parallel_core.config import replace
from fivefold.parallel_core.hub import SafetensorsReader

IDS = torch.arange(40).view(2, 20) * 3 % 257


@torch.no_grad()
def logits_after(
    model: HybridForCausalLM, folder: Path, candidate: Candidate, scores: Scores
) -> torch.Tensor:
    write_student(folder, candidate, scores, folder.parent / "student")
    student = HybridForCausalLM.from_pretrained(folder.parent / "student")
    expected = pruned_config(model.config, candidate)
    for key in ("pattern", "intermediate_size", "num_mamba_heads", "hidden_size"):
        assert getattr(student.config, key) == getattr(expected, key)
    return student(IDS)


@torch.no_grad()
def test_the_whole_is_the_parent_bit_for_bit(
    make_model: Callable[..., HybridForCausalLM], save: Callable[..., Path]
) -> None:
    model = make_model()
    scores = random_scores(model.config, 0)
    assert torch.equal(logits_after(model, save(model), whole(model.config), scores), model(IDS))


@torch.no_grad()
def test_dead_neurons_go_without_a_change(
    make_model: Callable[..., HybridForCausalLM], save: Callable[..., Path]
) -> None:
    """Logits change by rounding only, as products sum in another order."""
    model = make_model(mlp_bias=True)
    scores = random_scores(model.config, 0)
    for index in (1, 3, 5):
        dead = torch.randperm(24)[:8]
        mixer = model.layers[str(index)].mixer
        mixer.up_proj.weight[dead] = 0.0
        mixer.up_proj.bias[dead] = -1.0
        scores.neurons[index][dead] = 0.0
    candidate = replace(whole(model.config), width=16)
    found = logits_after(model, save(model), candidate, scores)
    torch.testing.assert_close(found, model(IDS), rtol=0, atol=2e-5)


@torch.no_grad()
def test_layers_that_add_nothing_go_without_a_change(
    make_model: Callable[..., HybridForCausalLM], save: Callable[..., Path]
) -> None:
    model = make_model(tie_word_embeddings=True)
    model.layers["0"].mixer.out_proj.weight.zero_()
    model.layers["5"].mixer.down_proj.weight.zero_()
    candidate = replace(whole(model.config), layers=(1, 2, 3, 4, 6))
    scores = random_scores(model.config, 0)
    assert torch.equal(logits_after(model, save(model), candidate, scores), model(IDS))


@torch.no_grad()
def test_heads_that_give_nothing_go_from_each_group(
    make_model: Callable[..., HybridForCausalLM], save: Callable[..., Path]
) -> None:
    """A group's norm is of its heads' sizes, so the others are what they would be alone."""
    model = make_model(pattern="M-", use_bias=True)
    scores = random_scores(model.config, 0)
    scores.heads[0] = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    candidate = replace(whole(model.config), mamba_heads=2)
    found = logits_after(model, save(model), candidate, scores)

    # The same in place: silent heads, and the mean over a whole group made one over its half.
    mixer = model.layers["0"].mixer
    norm, heads = mixer.norm.forward, torch.zeros(32)
    heads[[*range(8), *range(24, 32)]] = 1.0
    mixer.norm.forward = lambda y, z: norm(y * heads, z) * 2**-0.5
    torch.testing.assert_close(found, model(IDS), rtol=0, atol=2e-4)


@torch.no_grad()
def test_experts_that_nobody_chooses_go_without_a_change(
    make_model: Callable[..., HybridForCausalLM], save: Callable[..., Path]
) -> None:
    model = make_model()
    mixer = model.layers["6"].mixer
    mixer.router.bias[:] = torch.tensor([0.0, -50.0, 0.0, -50.0])
    scores = random_scores(model.config, 0)
    scores.experts[6] = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    candidate = replace(whole(model.config), experts=2)
    found = logits_after(model, save(model), candidate, scores)
    torch.testing.assert_close(found, model(IDS), rtol=0, atol=2e-5)


def test_orders_and_ties(make_model: Callable[..., HybridForCausalLM]) -> None:
    config = make_model().config  # M-*-M-E
    layers = torch.tensor([3.0, 1.0, 0.0, 1.0, 2.0, 5.0, 0.0])
    assert removal_order(config, layers, "-") == [3, 1, 5]
    assert best_layers(config, layers, {"M": 1, "-": 2, "*": 0, "E": 1}) == (0, 1, 5, 6)
    assert best(torch.tensor([1.0, 3.0, 1.0, 2.0]), 3).tolist() == [0, 1, 3]
    assert best_in_groups(torch.tensor([1.0, 3.0, 9.0, 8.0]), 2, 2).tolist() == [1, 2]
    one = Candidate(layers=(0, 1, 5), width=8, experts=4, mamba_heads=4)
    assert counts_of(config, one) == {"*": 0, "M": 1, "-": 2, "E": 0}


def test_files_keep_their_types_and_lose_prediction_depths(
    make_model: Callable[..., HybridForCausalLM], save: Callable[..., Path], tmp_path: Path
) -> None:
    model = make_model(num_nextn_predict_layers=1, mtp_pattern="*").to(torch.bfloat16)
    folder = save(model)
    candidate = replace(whole(model.config), layers=(0, 1, 6), width=8)
    write_student(folder, candidate, random_scores(model.config, 1), tmp_path / "student")
    with SafetensorsReader(tmp_path / "student") as reader:
        assert not [name for name in reader.names() if name.startswith("mtp.")]
        wide = {name for name in reader.names() if reader.dtype(name) == torch.float32}
    assert {name.rpartition(".")[2] for name in wide} == {
        "A_log", "D", "dt_bias", "e_score_correction_bias",
    }  # fmt: skip


def test_what_cannot_be_cut(
    make_model: Callable[..., HybridForCausalLM], save: Callable[..., Path], tmp_path: Path
) -> None:
    model = make_model()
    folder, scores = save(model), random_scores(model.config, 0)
    odd = replace(whole(model.config), mamba_heads=3)
    with pytest.raises(HybridConfigError, match="num_mamba_heads 3 is not a multiple of num_group"):
        write_student(folder, odd, scores, tmp_path / "student")
    scores.heads.clear()
    few = replace(whole(model.config), mamba_heads=2)
    with pytest.raises(HybridConfigError, match=r"heads were not scored; set importance\.mamba_h"):
        write_student(folder, few, scores, tmp_path / "student")
    with pytest.raises(HybridConfigError, match="keeps at least one, in ascending order"):
        Candidate(layers=(2, 1), width=1, experts=0, mamba_heads=0)
    with pytest.raises(HybridConfigError, match="3 cannot be shared by 2 groups"):
        best_in_groups(torch.ones(4), 3, 2)
