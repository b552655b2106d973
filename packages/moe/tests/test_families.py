"""Every family against transformers' own model, and what a family cannot say."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from fivefold.moe import MoEConfig, MoEForCausalLM
from fivefold.moe.errors import MoEConfigError, MoEWeightsError
from fivefold.moe.families import FAMILIES
from fivefold.moe.hf import hf_sources
from fivefold.moe.router_config import RouterConfig

Make = Callable[..., MoEConfig]
Oracle = Callable[..., tuple[MoEForCausalLM, Any]]
NAMES = list(FAMILIES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("exact_oracle")
def test_logits_loss_and_gradients_are_theirs(family: Make, oracle: Oracle, name: str) -> None:
    ours, theirs = oracle(family(name), torch.float64)
    ids = torch.randint(0, 48, (3, 17))
    found, wanted = ours(ids), theirs(ids, labels=ids)
    torch.testing.assert_close(found, wanted.logits, rtol=1e-10, atol=1e-10)
    # Their loss is in float32 whatever the model is.
    losses = [
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        for logits in (found, wanted.logits)
    ]
    assert losses[0].item() == pytest.approx(wanted.loss.item(), rel=1e-6)
    for loss in losses:
        loss.backward()
    grads = their_gradients(theirs)
    for key, parameter in ours.named_parameters():
        for source, index in hf_sources(ours.config, key, tuple(parameter.shape)):
            found = parameter.grad[index]
            torch.testing.assert_close(found, grads[source], rtol=1e-8, atol=1e-11)


def their_gradients(theirs: Any) -> dict[str, Tensor]:
    """Gradients by the names in their files, which hold each expert by itself."""
    family = FAMILIES[theirs.config.model_type]
    *inward, outward = family.experts
    grads: dict[str, Tensor] = {}
    for name, parameter in theirs.named_parameters():
        layer = name.replace(".mlp.experts.", f".{family.block}.experts.")
        layer, _, last = layer.rpartition(".")
        for e, grad in enumerate(parameter.grad if ".experts." in name else ()):
            words, parts = (inward, grad.chunk(2)) if "gate_up" in last else ([outward], [grad])
            names = [f"{layer}.{e}.{word}.weight" for word in words]
            grads |= dict(zip(names, parts, strict=True))
        grads[name.replace(".mlp.gate.weight", f".{family.block}.gate.weight")] = parameter.grad
    return grads


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_files_go_there_and_back(family: Make, tmp_path: Path, name: str, tied: bool) -> None:
    ours = MoEForCausalLM(family(name, tie_word_embeddings=tied))
    for buffer in ours.buffers():
        buffer.uniform_(-0.3, 0.3)
    ours.save_pretrained(tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", experts_implementation="eager"
    )
    ids = torch.randint(0, 48, (2, 9))
    torch.testing.assert_close(theirs(ids).logits, ours.eval()(ids), rtol=1e-4, atol=1e-3)
    theirs.save_pretrained(tmp_path / "theirs")
    again = MoEForCausalLM.from_pretrained(tmp_path / "theirs")
    assert again.config == ours.config
    again.save_pretrained(tmp_path / "again")
    files = [load_file(tmp_path / of / "model.safetensors") for of in ("ours", "theirs", "again")]
    assert files[0].keys() == files[1].keys() == files[2].keys()
    for key, tensor in files[0].items():
        assert torch.equal(tensor, files[1][key]) and torch.equal(tensor, files[2][key])


@pytest.mark.parametrize("name", NAMES)
def test_configuration_goes_there_and_back(family: Make, name: str) -> None:
    router = RouterConfig.from_dict({**family(name).router.to_dict(), "aux_loss_coef": 0.003})
    config = family(name, router=router)
    assert MoEConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    assert MoEConfig.from_hf(AutoConfig.for_model(**config.to_hf()).to_dict()) == config
    assert MoEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_bias_of_a_router_stays_float32(family: Make, tmp_path: Path) -> None:
    model = MoEForCausalLM(family("glm4_moe"))
    bias = model.layers["1"].mlp.router.bias
    assert bias.dtype == torch.float32 and not bias.any()
    bias += torch.linspace(64, 64.25, 8)  # bfloat16 has nothing between 64 and 64.5
    kept = bias.clone()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    again = MoEForCausalLM.from_pretrained(tmp_path)
    assert again.layers["1"].mlp.router.weight.dtype == torch.bfloat16
    assert torch.equal(again.layers["1"].mlp.router.bias, kept)


def test_layers_that_predict_further_ahead_are_not_read(family: Make, tmp_path: Path) -> None:
    for name in ("glm4_moe", "qwen3_moe"):
        folder = tmp_path / name
        MoEForCausalLM(family(name)).save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.4.eh_proj.weight"] = torch.zeros(3)
        save_file(tensors, folder / "model.safetensors")
    MoEForCausalLM.from_pretrained(tmp_path / "glm4_moe")
    with pytest.raises(MoEWeightsError, match=r"not of this model: model\.layers\.4\.eh_proj"):
        MoEForCausalLM.from_pretrained(tmp_path / "qwen3_moe")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mixtral", {"qk_norm": True}, r"qk_norm is True; a mixtral .* False .*\(qwen3_moe, glm4"),
        ("mixtral", {"router": RouterConfig(normalize=False)}, "router.normalize is False; a mixt"),
        ("mixtral", {"shared_intermediate_size": 8}, "shared_intermediate_size is 8; a mixtral"),
        ("qwen2_moe", {"shared_gate": False}, "shared_gate is False; a qwen2_moe model has True"),
        ("qwen2_moe", {"shared_intermediate_size": 0}, "shared_gate is True; it must be false wh"),
        ("qwen3_moe", {"qk_norm": False}, "qk_norm is False; a qwen3_moe model has True there"),
        ("qwen3_moe", {"rotary_fraction": 0.4}, r"rotary_fraction is 0\.4.*\(glm4_moe could"),
        ("glm4_moe", {"router": RouterConfig()}, "router.score is 'softmax'; a glm4_moe model has"),
        ("glm4_moe", {"dense_layers": (1,)}, "those of a glm4_moe model are its first ones"),
        ("glm4_moe", {"shared_intermediate_size": 40}, "a multiple of expert_intermediate_size 24"),
    ],
)
def test_what_a_family_cannot_say(
    family: Make, name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(MoEConfigError, match=message):
        family(name, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense_layers": (4,)}, r"dense_layers is \(4,\); it must be different layers from 0"),
        ({"dense_layers": (2, 0)}, r"dense_layers is \(2, 0\); .* in order"),
        ({"dense_layers": (0, 1, 2, 3)}, "dense_layers holds all 4 layers"),
        ({"intermediate_size": 0}, r"intermediate_size is 0 with dense_layers \(0, 2\)"),
        ({"dense_layers": ()}, r"intermediate_size is 56 with dense_layers \(\)"),
    ],
)
def test_dense_layers_that_cannot_be(family: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MoEConfigError, match=message):
        family("qwen3_moe", **changes)


def test_qwens_rule_of_dense_layers(family: Make) -> None:
    described = family("qwen3_moe").to_hf() | {"decoder_sparse_step": 2, "mlp_only_layers": [1]}
    assert MoEConfig.from_hf(described).dense_layers == (0, 1, 2)
    with pytest.raises(MoEConfigError, match=r"use_sliding_window is True .* only False"):
        MoEConfig.from_hf(family("qwen2_moe").to_hf() | {"use_sliding_window": True})
