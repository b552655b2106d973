"""What is written is read back, by our reader and by others'."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fivefold.fold.data.structures import read_structure, sequence_to_aatype
from fivefold.fold.errors import FoldDataError
from fivefold.fold.geometry.tables import tables
from fivefold.fold.predicting import files
from fivefold.fold.predicting.predict import Prediction

SEQUENCE = "ACDEFGHIKLMNPQRSTVWYX"


@pytest.fixture
def prediction() -> Prediction:
    """All amino acids and one that is unknown, at random places."""
    generator = torch.Generator().manual_seed(0)
    num = len(SEQUENCE)
    aatype = torch.from_numpy(sequence_to_aatype(SEQUENCE))
    exists = tables(torch.device("cpu"), torch.float32).atom37_exists
    return Prediction(
        name="some.protein",
        sequence=SEQUENCE,
        positions=20 * torch.randn(num, 37, 3, generator=generator),
        atom_mask=exists[aatype],
        plddt=100 * torch.rand(num, generator=generator),
        aligned_error=30 * torch.rand(num, num, generator=generator),
        max_aligned_error=31.75,
        ptm=0.5,
    )


@pytest.mark.parametrize("suffix", ["pdb", "cif"])
def test_atoms_come_back(prediction: Prediction, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"some.{suffix}"
    (files.write_pdb if suffix == "pdb" else files.write_mmcif)(prediction, path)
    (chain,) = read_structure(path).chains.values()
    # Of arginine the nearer of two like atoms is called NH1, whatever the file says.
    keep = np.array([letter != "R" for letter in SEQUENCE])
    known = prediction.atom_mask.numpy() > 0
    if suffix == "cif":
        assert chain.sequence == SEQUENCE
    else:
        keep = keep[: len(chain.sequence)]
    num = len(chain.sequence)
    np.testing.assert_array_equal(chain.mask > 0, known[:num])
    found = chain.positions[keep][known[:num][keep]]
    expected = prediction.positions.numpy()[:num][keep][known[:num][keep]]
    np.testing.assert_allclose(found, expected, atol=6e-4)


def test_b_factors_are_the_confidence(prediction: Prediction, tmp_path: Path) -> None:
    files.write_pdb(prediction, tmp_path / "x.pdb")
    lines = [x for x in (tmp_path / "x.pdb").read_text().splitlines() if x.startswith("ATOM")]
    for line in lines:
        assert float(line[60:66]) == pytest.approx(
            float(prediction.plddt[int(line[22:26]) - 1]), abs=0.006
        )


def test_the_report_is_json(prediction: Prediction, tmp_path: Path) -> None:
    found = files.report_of(prediction) | {"scores": {"lddt_ca": float("nan")}}
    files.write_report(found, tmp_path / "x.json")
    read = json.loads((tmp_path / "x.json").read_text())
    assert read["sequence"] == SEQUENCE and read["ptm"] == 0.5
    assert read["scores"]["lddt_ca"] is None
    assert len(read["predicted_aligned_error"]) == len(SEQUENCE) == len(read["plddt"])


@pytest.mark.parametrize("with_errors", [True, False])
def test_a_picture_is_drawn(prediction: Prediction, tmp_path: Path, with_errors: bool) -> None:
    if not with_errors:
        prediction = replace(prediction, aligned_error=None, ptm=None)
    files.plot(prediction, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_what_a_file_cannot_hold_is_said(prediction: Prediction, tmp_path: Path) -> None:
    broken = replace(prediction, positions=prediction.positions * float("nan"))
    with pytest.raises(FoldDataError, match="not finite"):
        files.write_mmcif(broken, tmp_path / "x.cif")
    num = 10_000
    long = replace(
        prediction,
        sequence="G" * num,
        positions=torch.zeros(num, 37, 3),
        atom_mask=torch.zeros(num, 37).index_fill(1, torch.tensor([1]), 1.0),
        plddt=torch.zeros(num),
    )
    with pytest.raises(FoldDataError, match="at most 9999"):
        files.write_pdb(long, tmp_path / "x.pdb")
    assert not list(tmp_path.iterdir())
