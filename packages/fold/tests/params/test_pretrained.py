"""Networks as folders and files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fold_network import alphafold_arrays, tiny_config

from fivefold.fold import AlphaFold
from fivefold.fold.errors import FoldConfigError, FoldParametersError
from fivefold.fold.params.formats import open_parameters


def same(one: AlphaFold, other: AlphaFold) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_a_saved_network_comes_back(tmp_path: Path, tiny_model: AlphaFold) -> None:
    tiny_model.save_pretrained(tmp_path / "saved", max_shard_size=20_000)
    assert len(list((tmp_path / "saved").glob("model-*.safetensors"))) > 1
    read = AlphaFold.from_pretrained(tmp_path / "saved")
    assert same(read, tiny_model) and read.config == tiny_model.config
    assert not read.training
    assert all(parameter.requires_grad for parameter in read.parameters())
    assert "AlphaFold.from_pretrained" in (tmp_path / "saved" / "README.md").read_text()


def test_exports_are_read_back(tmp_path: Path, tiny_model: AlphaFold) -> None:
    config = tiny_config()
    for style in ("alphafold", "openfold", "mlperf", "scalefold"):
        path = tmp_path / ("params.npz" if style == "alphafold" else f"{style}.pt")
        tiny_model.export(path, style)
        assert same(AlphaFold.from_pretrained(path, config=config), tiny_model), style
    arrays = alphafold_arrays(config)
    written = open_parameters(tmp_path / "params.npz").tensors
    assert written.keys() == arrays.keys()
    assert all(np.array_equal(written[name], arrays[name]) for name in arrays)


def test_what_cannot_be_is_said(tmp_path: Path, tiny_model: AlphaFold) -> None:
    with pytest.raises(FoldParametersError, match="no style 'jax'; there are alphafold, openfold"):
        tiny_model.export(tmp_path / "x", "jax")
    tiny_model.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | {"model_type": "bert"}))
    with pytest.raises(FoldConfigError, match="model_type 'bert'"):
        AlphaFold.from_pretrained(tmp_path)
    described["model"]["c_m"] = 24
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(
        FoldParametersError, match=r"has shape \(16, 22\), the network's is \(24, 22\)"
    ):
        AlphaFold.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FoldConfigError, match="no JSON"):
        AlphaFold.from_pretrained(tmp_path)
