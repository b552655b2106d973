"""Folders in transformers' form: what every model's base does with them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fivefold.parallel_core.build import ParallelModel, build
from fivefold.parallel_core.hub import SafetensorsReader
from fivefold.parallel_core.hub.fill import fill
from fivefold.parallel_core.hub.pretrained import (
    CONFIG,
    Faults,
    Pretrained,
    asked_dtype,
    check_dtypes,
    config_dtype,
    main_dtype,
    read_json,
    write_folder,
)
from fivefold.parallel_core.hub.writer import Spec
from fivefold.parallel_core.parameters import Piece
from fivefold.parallel_core.styles import ColumnParallel
from fivefold.parallel_core.topology import Topology

from ..imagined import imagined


class WrongConfigError(Exception):
    """A configuration that cannot be."""


class WrongArgumentError(Exception):
    """A value that cannot be asked for."""


class WrongWeightsError(Exception):
    """Not the model's tensors."""


class Small(Pretrained):
    """One linear layer, which files call "theirs"."""

    faults = Faults(config=WrongConfigError, argument=WrongArgumentError, weights=WrongWeightsError)

    def __init__(self, config: dict[str, Any]):
        super().__init__(config)
        self.layers = nn.ModuleDict({"0": nn.Linear(config["width"], 4, bias=False)})

    @classmethod
    def _read_config(cls, folder: Path) -> dict[str, Any]:
        return read_json(folder / CONFIG, WrongConfigError)

    @classmethod
    def _stored(cls, config: dict[str, Any], reader: SafetensorsReader) -> list[Spec]:
        specs = [("theirs", reader.shape("theirs"), reader.dtype("theirs"))]
        check_dtypes(specs, WrongWeightsError)
        return specs

    @classmethod
    def _part(cls, config: dict[str, Any], topology: Topology, dtype: torch.dtype) -> ParallelModel:
        plan = {"layers.*": ColumnParallel()}
        return build(lambda: cls(config), topology, plan, head=(), tail=(), dtype=dtype)

    def _fill(self, pieces: list[Piece], reader: SafetensorsReader, dtype: torch.dtype) -> None:
        for piece in pieces:
            fill(piece.tensor, piece.box, piece.shape, [("theirs", ())], reader)

    def _saved(self) -> tuple[dict[str, Tensor], Mapping[str, tuple[int, ...]]]:
        shape = (4, self.config["width"])
        return dict(self.named_parameters()), {"layers.0.weight": shape}

    def _write(self, folder: Path, saved: Mapping[str, Tensor], max_shard_size: int | str) -> None:
        (weight,) = saved.values()
        specs = [("theirs", tuple(weight.shape), weight.dtype)]
        tensors = [("theirs", weight.detach())]
        described = {"width": self.config["width"], "end": 3}
        write_folder(folder, described, specs, tensors, card="a card", generation=["end"])


def saved(folder: Path, dtype: torch.dtype = torch.float32) -> Small:
    model = Small({"width": 6}).to(dtype)
    model.save_pretrained(folder)
    return model


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    model = saved(tmp_path, torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "width": 6,
        "end": 3,
        "dtype": "bfloat16",
    }
    found = json.loads((tmp_path / "generation_config.json").read_text())
    assert found == {"_from_model_config": True, "end": 3}
    again = Small.from_pretrained(tmp_path)
    assert not again.training
    assert again.layers["0"].weight.dtype == torch.bfloat16
    assert torch.equal(again.layers["0"].weight, model.layers["0"].weight)
    (tmp_path / "README.md").write_text("a person's own")
    again.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "a person's own"


def test_the_type_is_asked_for_or_the_configuration_s_or_the_files(tmp_path: Path) -> None:
    saved(tmp_path)
    wanted = [("float64", torch.float64), (torch.bfloat16, torch.bfloat16), (None, torch.float32)]
    for asked, dtype in wanted:
        assert Small.from_pretrained(tmp_path, dtype=asked).layers["0"].weight.dtype == dtype
    for described, dtype in ({"torch_dtype": "float16"}, torch.float16), ({}, torch.float32):
        (tmp_path / CONFIG).write_text(json.dumps({"width": 6, **described}))
        assert Small.from_pretrained(tmp_path).layers["0"].weight.dtype == dtype
    (tmp_path / CONFIG).write_text(json.dumps({"dtype": "int8"}))
    with pytest.raises(WrongConfigError, match=r"^dtype is 'int8' in config\.json; legal: float64"):
        config_dtype(tmp_path, WrongConfigError)
    with pytest.raises(WrongArgumentError, match="legal: float64, float32, bfloat16, float16, or"):
        asked_dtype("fp8", WrongArgumentError)
    with pytest.raises(WrongWeightsError, match=r"'a' on disk is of torch\.int8; .*, and more$"):
        check_dtypes([("a", (1,), torch.int8)], WrongWeightsError, ", and more")


def test_a_part_is_loaded_and_cannot_be_saved(tmp_path: Path) -> None:
    model = saved(tmp_path)
    part = Small.from_pretrained(tmp_path, imagined(2, tp=2)[1])
    assert torch.equal(part.layers["0"].weight, model.layers["0"].weight[2:])
    with pytest.raises(WrongWeightsError, match=r"of shape \(4, 6\): .* holds \(2, 6\) of it"):
        part.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot read .*: No such file"), ("{", "no JSON|not a JSON object"), ("3", "a int")],
)
def test_what_is_no_json_object(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / CONFIG).write_text(text)
    with pytest.raises(WrongConfigError, match=message):
        read_json(tmp_path / CONFIG, WrongConfigError)


def test_the_type_of_most_elements() -> None:
    specs: list[Spec] = [("a", (3, 3), torch.bfloat16), ("b", (8,), torch.float32)]
    assert main_dtype(specs) == torch.bfloat16
