"""Model-Optimizer's layout: what is written is read back, within the rounding of E4M3."""

import json
from pathlib import Path

import torch

from fivefold.hybrid_ssm import HybridForCausalLM, fp8
from fivefold.kernels import fp8_quantize
from fivefold.parallel_core.hub import SafetensorsReader

from .test_apply import IDS, MODEL


def test_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = HybridForCausalLM(MODEL).to(torch.bfloat16).eval()
    maxima = fp8.calibrate(model, [IDS])
    names = fp8.save_fp8(model, tmp_path, maxima, first=1, last=1)
    prefix = "backbone.layers."
    assert f"{prefix}2.mixer.in_proj.weight" in names and f"{prefix}4.mixer.q_proj.weight" in names
    assert f"{prefix}3.mixer.experts.3.down_proj.weight" in names
    assert not [name for name in names if name.startswith((f"{prefix}0.", f"{prefix}5."))]
    assert not [name for name in names if "gate" in name or "conv1d" in name]
    with SafetensorsReader(tmp_path) as reader:
        for name in names:
            assert reader.dtype(name) == torch.float8_e4m3fn
            scale = reader.read(name.replace(".weight", ".weight_scale"))
            assert scale.shape == () and scale.dtype == torch.float32
        weight = reader.read(f"{prefix}4.mixer.o_proj.weight")
        found = reader.read(f"{prefix}4.mixer.o_proj.input_scale")
    assert float(found) == maxima["layers.4.mixer.o_proj"] / 448 or torch.isclose(
        found, torch.tensor(maxima["layers.4.mixer.o_proj"] / 448)
    )
    ours = model.layers["4"].mixer.o_proj.weight
    rounded, _ = fp8_quantize(ours)
    # One is times a scale and the other divided by its inverse: a bit at the middle of two values.
    steps = (rounded.view(torch.uint8).int() - weight.view(torch.uint8).int()).abs()
    assert int(steps.max()) <= 1 and float((steps > 0).float().mean()) < 0.01

    again = HybridForCausalLM.from_pretrained(tmp_path)
    for name, value in model.named_parameters():
        read = again.get_parameter(name)
        assert read.dtype == value.dtype
        rest = (read.double() - value.double()).abs()
        limit = value.double().abs() / 8 + value.double().abs().amax() / 448 / 512
        assert bool((rest <= limit).all()), name
    with torch.no_grad():
        gap = (again(IDS) - model(IDS)).float().norm() / model(IDS).float().norm()
    assert 0 < float(gap) < 0.15


def test_what_readers_are_told(tmp_path: Path) -> None:
    model = HybridForCausalLM(MODEL)
    names = fp8.save_fp8(model, tmp_path, first=0, last=0, experts=False)
    told = json.loads((tmp_path / "hf_quant_config.json").read_text())
    assert told["producer"]["name"] == "modelopt"
    assert told["quantization"]["quant_algo"] == "FP8"
    left = told["quantization"]["exclude_modules"]
    assert "lm_head" in left and "backbone.embeddings" in left
    assert "backbone.layers.3.mixer.gate" in left
    assert "backbone.layers.3.mixer.experts.0.up_proj" in left
    assert not set(left) & {name.removesuffix(".weight") for name in names}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["quant_algo"] == "FP8"
    with SafetensorsReader(tmp_path) as reader:
        assert not [name for name in reader.names() if name.endswith("input_scale")]


def test_zeros_are_written_and_read(tmp_path: Path) -> None:
    model = HybridForCausalLM(MODEL)
    with torch.no_grad():
        model.layers["1"].mixer.up_proj.weight.zero_()
    fp8.save_fp8(model, tmp_path, first=1, last=1)
    again = HybridForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.layers["1"].mixer.up_proj.weight, torch.zeros(24, 16))
