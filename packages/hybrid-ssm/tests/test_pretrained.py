"""Model folders: there and back, quantised, partial, damaged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fivefold.hybrid_ssm import HybridConfig, HybridForCausalLM
from fivefold.hybrid_ssm.errors import (
    HybridConfigError,
    HybridInputError,
    HybridWeightsError,
)
from fivefold.hybrid_ssm.hf import kept_tensors
from fivefold.parallel_core.inference import whole_logits
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.topology import Topology

from .conftest import tiny_config

Make = Callable[..., HybridConfig]
Oracle = Callable[..., tuple[HybridForCausalLM, Any]]
CHANGES: dict[str, dict[str, Any]] = {
    "every kind": {},
    "latent and biases": {"latent_size": 32, "use_bias": True, "mlp_bias": True},
    "limits": {"pattern": "M*-", "time_step_limit": (0.01, 0.5), "eos_token_id": (3, 4)},
    "mamba2": {"model_type": "mamba2", "pattern": "MM"},
    "mamba2 tied": {"model_type": "mamba2", "pattern": "MM", "tie_word_embeddings": True},
}

CHECKED = tiny_config(latent_size=32)


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("name", CHANGES)
def test_ours_to_theirs_to_ours_is_bitwise(name: str, tiny: Make, tmp_path: Path) -> None:
    config = tiny(**CHANGES[name])
    ours = HybridForCausalLM(config)
    ours.save_pretrained(tmp_path / "ours", max_shard_size="100KB")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs.save_pretrained(tmp_path / "theirs")
    again = HybridForCausalLM.from_pretrained(tmp_path / "theirs")
    for (key, found), (other, expected) in zip(
        again.named_parameters(), ours.named_parameters(), strict=True
    ):
        assert key == other
        assert torch.equal(found, expected), key
    again.save_pretrained(tmp_path / "again")
    assert_same(all_tensors(tmp_path / "again"), all_tensors(tmp_path / "ours"))
    read = json.loads((tmp_path / "again" / "config.json").read_text())
    assert HybridConfig.from_hf(read).pattern == config.pattern


def test_bfloat16_files_come_back_as_they_were(tiny: Make, tmp_path: Path) -> None:
    """Decays in float32 beside weights in bfloat16, and decays in bfloat16 too."""
    model = HybridForCausalLM(tiny()).to(torch.bfloat16)
    model.get_buffer("layers.6.mixer.router.bias").copy_(torch.randn(4) + 64)
    model.save_pretrained(tmp_path / "mixed")
    mixed = all_tensors(tmp_path / "mixed")
    assert mixed["backbone.layers.0.mixer.A_log"].dtype == torch.float32
    assert mixed["backbone.layers.5.norm.weight"].dtype == torch.bfloat16
    assert mixed["backbone.layers.6.mixer.gate.e_score_correction_bias"].dtype == torch.float32
    again = HybridForCausalLM.from_pretrained(tmp_path / "mixed")
    assert again.lm_head.weight.dtype == torch.bfloat16
    again.save_pretrained(tmp_path / "again")
    assert_same(all_tensors(tmp_path / "again"), mixed)
    narrow = {k: v.bfloat16() if k.endswith("A_log") else v for k, v in mixed.items()}
    save_file(narrow, tmp_path / "mixed" / "model.safetensors", metadata={"format": "pt"})
    narrow_model = HybridForCausalLM.from_pretrained(tmp_path / "mixed")
    narrow_model.save_pretrained(tmp_path / "narrow")
    assert_same(all_tensors(tmp_path / "narrow"), narrow)
    wide = HybridForCausalLM.from_pretrained(tmp_path / "mixed", dtype="float32")
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


def test_tensors_of_prediction_depths_are_kept(tiny: Make, tmp_path: Path) -> None:
    config = tiny(num_nextn_predict_layers=1)
    HybridForCausalLM(config).save_pretrained(tmp_path / "without")
    kept = {name: torch.randn(shape) for name, shape in kept_tensors(config).items()}
    tensors = all_tensors(tmp_path / "without") | kept
    save_file(tensors, tmp_path / "without" / "model.safetensors", metadata={"format": "pt"})
    model = HybridForCausalLM.from_pretrained(tmp_path / "without")
    model.save_pretrained(tmp_path / "with", max_shard_size="200KB")
    assert_same(all_tensors(tmp_path / "with"), tensors)
    # Saved over the files that the kept tensors lie in.
    model.save_pretrained(tmp_path / "without")
    assert_same(all_tensors(tmp_path / "without"), tensors)


def quantise(folder: Path, algorithm: str = "FP8") -> dict[str, torch.Tensor]:
    """Turn a folder's projections into float8 with scales, as ModelOpt does; the true values."""
    tensors = all_tensors(folder)
    values = dict(tensors)
    for name, tensor in list(tensors.items()):
        if "proj.weight" not in name:
            continue
        stem = name.removesuffix("weight")
        scale = tensor.abs().max() / 448
        tensors[name] = (tensor / scale).to(torch.float8_e4m3fn)
        tensors[f"{stem}weight_scale"] = scale.float()
        tensors[f"{stem}input_scale"] = torch.tensor(0.5)
        values[name] = tensors[name].float() * scale
        if stem.endswith("k_proj."):
            tensors[f"{stem}k_scale"] = torch.tensor(1.0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    described["dtype"] = "bfloat16"
    described["quantization_config"] = {"quant_method": "modelopt", "quant_algo": algorithm}
    (folder / "config.json").write_text(json.dumps(described))
    beside = {"quantization": {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(beside))
    return values


def test_float8_files_are_read_with_their_scales(tiny: Make, tmp_path: Path) -> None:
    HybridForCausalLM(tiny()).save_pretrained(tmp_path)
    values = quantise(tmp_path)
    model = HybridForCausalLM.from_pretrained(tmp_path, dtype="float32")
    model.save_pretrained(tmp_path / "read")
    found = all_tensors(tmp_path / "read")
    assert found.keys() == values.keys()
    for name, expected in values.items():
        assert torch.equal(found[name], expected), name
    assert HybridForCausalLM.from_pretrained(tmp_path).lm_head.weight.dtype == torch.bfloat16


def test_float8_without_a_scale_and_other_quantisations_are_refused(
    tiny: Make, tmp_path: Path
) -> None:
    HybridForCausalLM(tiny()).save_pretrained(tmp_path)
    quantise(tmp_path)
    tensors = all_tensors(tmp_path)
    name = "backbone.layers.0.mixer.in_proj.weight_scale"
    scale = tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(HybridWeightsError, match=f"its scale '{name}' is missing"):
        HybridForCausalLM.from_pretrained(tmp_path)
    save_file(tensors | {name: scale.expand(3).clone()}, tmp_path / "model.safetensors")
    with pytest.raises(HybridWeightsError, match=r"has shape \(3,\); a tensor in float8 has one"):
        HybridForCausalLM.from_pretrained(tmp_path)
    HybridForCausalLM(tiny()).save_pretrained(tmp_path)
    quantise(tmp_path, "NVFP4")
    with pytest.raises(HybridConfigError, match=r"quant_algo 'NVFP4' \(config.json\)"):
        HybridForCausalLM.from_pretrained(tmp_path)


def test_the_older_name_of_the_embedding_is_read(tiny: Make, tmp_path: Path) -> None:
    config = tiny(model_type="mamba2", pattern="M")
    model = HybridForCausalLM(config)
    model.save_pretrained(tmp_path)
    tensors = all_tensors(tmp_path)
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    again = HybridForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.embed_tokens.weight, model.embed_tokens.weight)


def test_what_is_wrong_with_a_folder_is_named(tiny: Make, tmp_path: Path) -> None:
    with pytest.raises(HybridInputError, match="dtype is 'int8'; legal: float64"):
        HybridForCausalLM.from_pretrained(tmp_path, dtype="int8")
    HybridForCausalLM(tiny()).save_pretrained(tmp_path)
    tensors = all_tensors(tmp_path)
    tensors["backbone.layers.0.mixer.A_log"] = torch.zeros(7)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(HybridWeightsError, match=r"A_log' on disk has shape \(7,\), .* needs \(8,"):
        HybridForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(HybridConfigError, match="it holds a list"):
        HybridForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(HybridConfigError, match="is not a JSON object"):
        HybridForCausalLM.from_pretrained(tmp_path)


def test_a_part_of_a_model_is_not_saved(tiny: Make, tmp_path: Path) -> None:
    model = HybridForCausalLM(tiny())
    model.lm_head = None
    with pytest.raises(HybridWeightsError, match=r"'lm_head.weight' .* holds nothing of it"):
        model.save_pretrained(tmp_path)


def test_the_card_says_what_there_is(tiny: Make, tmp_path: Path) -> None:
    HybridForCausalLM(tiny()).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "`M-M*-ME*EM-`: 4 Mamba-2, 2 attention, 3 MLP, 2 experts" in text
    (tmp_path / "README.md").write_text("mine")
    HybridForCausalLM(tiny()).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def _load_part(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """On each of four ranks: read the slices of this rank, and give the logits of all."""
    topology = Topology(Layout(4, tp=2, pp=2, ep=2))
    model = HybridForCausalLM.from_pretrained(folder, topology)
    return whole_logits(model, topology, ids, vocab_size=97, hidden_size=64)


def test_ranks_read_their_slices(oracle: Oracle, tmp_path: Path) -> None:
    model, _ = oracle(CHECKED)
    ids = torch.arange(32).view(2, 16)
    with torch.no_grad():
        expected = model(ids)
    for found in launch(_load_part, 4, tmp_path / "oracle", ids):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
