"""Confidence is what AlphaFold reads from its logits, and a structure is not looked at."""

import dataclasses
from pathlib import Path

import pytest
import torch

from fivefold.fold.config import FeatureConfig
from fivefold.fold.model.alphafold import AlphaFold
from fivefold.fold.predicting.inputs import from_structure
from fivefold.fold.predicting.predict import error_centers, plddt, predict, predicted_tm

REAL = Path(__file__).parents[1] / "real"
CONFIG = FeatureConfig(max_msa_clusters=4, max_extra_msa=4, max_templates=1, num_recycles=1)


def test_plddt_is_the_mean_of_the_middles_of_bins() -> None:
    logits = torch.full((3, 50), -100.0)
    logits[0, 0] = logits[1, 49] = logits[2, 10] = logits[2, 11] = 100.0
    torch.testing.assert_close(plddt(logits), torch.tensor([1.0, 99.0, 22.0]))


def test_errors_lie_in_the_middles_of_bins_of_half_an_angstrom() -> None:
    breaks = torch.linspace(0.0, 31.0, 63)
    centers = error_centers(breaks)
    assert centers.shape == (64,)
    assert centers[[0, 1, -1]].tolist() == pytest.approx([0.25, 0.75, 31.75])


@pytest.mark.parametrize(("length", "scale"), [(30, 1.24 * 15 ** (1 / 3) - 1.8), (7, 0.168378)])
def test_ptm_of_certain_errors_is_the_tm_score_of_them(length: int, scale: float) -> None:
    breaks = torch.linspace(0.0, 31.0, 63)
    bins = torch.randint(64, (length, length), generator=torch.Generator().manual_seed(0))
    logits = torch.nn.functional.one_hot(bins, 64) * 200.0
    error = error_centers(breaks)[bins]
    expected = (1 / (1 + (error / scale) ** 2)).mean(-1).max()
    torch.testing.assert_close(predicted_tm(logits, breaks), expected)


def test_a_prediction_is_of_the_sequence_alone(tiny_model: AlphaFold) -> None:
    (example,) = from_structure(REAL / "structures/1a8o.cif.gz", ["A"])
    found = predict(tiny_model, example, CONFIG)
    blind = predict(tiny_model, dataclasses.replace(example, chain=None), CONFIG)
    assert torch.equal(found.positions, blind.positions)
    num = len(example.sequence)
    assert found.positions.shape == (num, 37, 3) and found.plddt.shape == (num,)
    assert found.aligned_error is not None and found.aligned_error.shape == (num, num)
    assert found.ptm is not None and 0 < found.ptm < 1
    assert found.max_aligned_error == pytest.approx(31.75)
    assert bool(((found.plddt > 0) & (found.plddt < 100)).all())
