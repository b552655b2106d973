"""Layers to files and back; what is damaged is told."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fivefold.sparse_rnn import SparseGRU, SparseLSTM, SparseRNN, SparseRNNFileError, files, pattern


@pytest.mark.parametrize(
    "layer",
    [
        SparseLSTM(5, 19, 2, bidirectional=True, dropout=0.25, density=0.2),
        SparseGRU(5, 16, bias=False, batch_first=True, density=0.0),
        SparseRNN(5, 8, nonlinearity="relu", density=1.0).to(torch.bfloat16),
    ],
)
def test_a_layer_comes_back_bit_for_bit(layer: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        if layer.weight_hh_l0.numel():
            layer.weight_hh_l0[0] = 0.0  # a kept zero keeps its place
    layer.save_pretrained(tmp_path)
    other = type(layer).from_pretrained(tmp_path)
    assert not other.training and repr(other) == repr(layer)
    assert other.dropout == layer.dropout and other.mode == layer.mode
    for name, parameter in layer.named_parameters():
        assert torch.equal(other.get_parameter(name), parameter)
        assert other.get_parameter(name).dtype == parameter.dtype
    for name in layer.recurrent_names():
        assert torch.equal(other.mask(name), layer.mask(name))
    assert SparseLSTM.from_pretrained is not None


def test_fields_are_as_documented() -> None:
    mask = torch.zeros(3, 10, dtype=torch.bool)
    mask[0, 0] = mask[0, 9] = mask[2, 3] = True
    values = torch.tensor([1.0, 2.0, 3.0])
    fields = files.compress(values, *pattern.from_mask(mask), 10)
    assert fields["bitmask"].tolist() == [[1, 2], [0, 0], [8, 0]]
    assert fields["row_offsets"].tolist() == [0, 2, 2]
    assert fields["shape"].tolist() == [3, 10]
    dense, again = files.expand(fields)
    assert torch.equal(again, mask) and torch.equal(dense[mask], values)
    assert int((dense != 0).sum()) == 3


def test_a_file_says_what_it_is_and_is_small(tmp_path: Path) -> None:
    layer = SparseLSTM(4, 128, density=0.1)
    layer.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata["gate_order"]) == "i,f,g,o"
    assert json.loads(metadata["format_version"]) == 1
    assert (tmp_path / "model.safetensors").stat().st_size < 60_000  # dense: 280 kB


def test_dtype_may_be_asked_for(tmp_path: Path) -> None:
    layer = SparseGRU(4, 8, density=0.5)
    layer.save_pretrained(tmp_path)
    other = SparseGRU.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(other.weight_hh_l0, layer.weight_hh_l0.double())


def _damage(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("weight_hh_l0.shape"), "lacks shape"),
        (lambda t: t["weight_hh_l0.bitmask"].fill_(255), "bits that are set"),
        (lambda t: t["weight_hh_l0.row_offsets"].add_(1), "not where the bitmask's rows begin"),
        (lambda t: t["weight_hh_l0.shape"].copy_(torch.tensor([24, 90])), "bitmask has shape"),
        (lambda t: t.pop("bias_ih_l0"), "does not fit its config.json"),
    ],
)
def test_damage_is_told(change: Any, message: str, tmp_path: Path) -> None:
    SparseGRU(4, 8, density=0.5).save_pretrained(tmp_path)
    _damage(tmp_path, change)
    with pytest.raises(SparseRNNFileError, match=message):
        SparseGRU.from_pretrained(tmp_path)


def test_other_folders_are_told(tmp_path: Path) -> None:
    with pytest.raises(SparseRNNFileError, match="expected a folder or a repository"):
        SparseGRU.from_pretrained(tmp_path / "none")
    with pytest.raises(SparseRNNFileError, match="cannot read"):
        SparseGRU.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(SparseRNNFileError, match="does not describe a layer"):
        SparseGRU.from_pretrained(tmp_path)
    SparseGRU(4, 8, density=0.5).save_pretrained(tmp_path)
    with pytest.raises(SparseRNNFileError, match="holds a GRU, not a SparseLSTM"):
        SparseLSTM.from_pretrained(tmp_path)


def test_pushing_uploads_what_was_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def push(folder: str, repo_id: str, **options: Any) -> str:
        seen.update(options, repo=repo_id, files=sorted(p.name for p in Path(folder).iterdir()))
        return "address"

    monkeypatch.setattr(files.hub, "push", push)
    assert SparseGRU(4, 8, density=0.5).push_to_hub("me/layer", private=True) == "address"
    assert seen["files"] == ["README.md", "config.json", "model.safetensors"]
    assert seen["repo"] == "me/layer" and seen["private"] is True


def test_a_card_says_what_there_is_and_is_kept(tmp_path: Path) -> None:
    SparseRNN(4, 8, nonlinearity="relu", bidirectional=True, density=0.25).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "# Sparse RNN_RELU, 8 units, 25.0% of the recurrent weights" in card
    assert "SparseRNN.from_pretrained(" in card and "| directions | 2 |" in card
    (tmp_path / "README.md").write_text("mine")
    SparseGRU(4, 8, density=0.5).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
