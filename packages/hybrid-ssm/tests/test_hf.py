"""Names, shapes and totals of files, from configurations alone."""

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from fivefold.hybrid_ssm import HybridConfig, HybridForCausalLM
from fivefold.hybrid_ssm.errors import HybridWeightsError
from fivefold.hybrid_ssm.files import saved_tensors
from fivefold.hybrid_ssm.hf import check_names, count_parameters, kept_tensors, stored_tensors
from fivefold.parallel_core.hub import SafetensorsReader

from .oracles import save_theirs, their_model
from .released import RELEASED, SUPER

Make = Callable[..., HybridConfig]


@pytest.mark.parametrize("name", RELEASED)
def test_totals_of_released_models(name: str) -> None:
    described, num_tensors, num_parameters = RELEASED[name]
    config = HybridConfig.from_hf(described)
    assert count_parameters(config) == (num_tensors, num_parameters)


@pytest.mark.parametrize("name", RELEASED)
def test_models_on_meta_have_as_many_parameters(name: str) -> None:
    config = HybridConfig.from_hf(RELEASED[name][0])
    with torch.device("meta"):
        model = HybridForCausalLM(config)
    kept = sum(map(prod, kept_tensors(config).values()))
    assert sum(t.numel() for t in saved_tensors(model).values()) + kept == RELEASED[name][2]


def test_latent_experts_of_the_super_model() -> None:
    assert round(count_parameters(HybridConfig.from_hf(SUPER))[1] / 1e9, 2) == 120.67


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"latent_size": 32, "mlp_bias": True, "use_bias": True},
        {"use_conv_bias": False, "pattern": "M*-"},
        {"model_type": "mamba2", "pattern": "MM", "tie_word_embeddings": True},
        {"model_type": "mamba2", "pattern": "MM"},
    ],
)
def test_names_and_shapes_are_those_of_transformers(
    changes: dict[str, Any], tiny: Make, tmp_path: Path
) -> None:
    config = tiny(**changes)
    save_theirs(their_model(config), tmp_path)
    reader = SafetensorsReader(tmp_path)
    theirs = {name: reader.shape(name) for name in reader.names()}
    assert {stored.name: stored.shape for stored in stored_tensors(config)} == theirs
    check_names(config, theirs)


def test_every_parameter_has_a_place(tiny: Make) -> None:
    config = tiny(latent_size=32, mlp_bias=True, use_bias=True)
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in saved_tensors(HybridForCausalLM(config)).items()}
    covered = dict.fromkeys(shapes, 0)
    for stored in stored_tensors(config):
        assert sum(part.size for part in stored.parts) == stored.shape[0]
        rest = prod(stored.shape[1:])
        for part in stored.parts:
            covered[part.name] += part.size * rest
    assert covered == {name: shape.numel() for name, shape in shapes.items()}


def test_kept_tensors_of_the_prediction_depths(tiny: Make) -> None:
    kept = kept_tensors(tiny(num_nextn_predict_layers=2, num_experts=2))
    assert kept["mtp.layers.2.eh_proj.weight"] == (64, 128)
    assert kept["mtp.layers.3.mixer.experts.1.up_proj.weight"] == (24, 64)
    assert kept["mtp.layers.1.final_layernorm.weight"] == (64,)
    # Of each depth: 3 to join, 2 norms, 4 of attention, 8 of two experts and the rest, the last.
    assert len(kept) == 2 * (3 + 2 + 4 + 8 + 1)
    assert kept_tensors(tiny()) == {}


def test_names_that_do_not_belong_are_listed(tiny: Make) -> None:
    config = tiny(pattern="M*")
    names = [stored.name for stored in stored_tensors(config)]
    with pytest.raises(HybridWeightsError, match=r"missing: backbone.norm_f.weight; .*: more$"):
        check_names(config, ["more", *(n for n in names if "norm_f" not in n)])
    beside = ["mtp.layers.0.norm.weight", "backbone.layers.0.mixer.in_proj.weight_scale"]
    beside.append("backbone.layers.1.mixer.k_proj.k_scale")
    check_names(config, [*names, *beside])
    with pytest.raises(HybridWeightsError, match=r"not of this model: backbone.x.weight_scale"):
        check_names(config, [*names, "backbone.x.weight_scale"])
