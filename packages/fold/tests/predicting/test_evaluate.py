"""Predictions are matched with chains by name, scored on what was seen, and problems named."""

import gzip
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fivefold.fold.data.structures import Chain, read_structure
from fivefold.fold.errors import FoldDataError
from fivefold.fold.predicting.evaluate import evaluate, score_chain

REAL = Path(__file__).parents[1] / "real" / "structures"


@pytest.fixture(scope="module")
def chain() -> Chain:
    return read_structure(REAL / "1a8o.cif.gz").chain("A")


def test_a_copy_is_perfect_and_noise_is_not(chain: Chain) -> None:
    perfect = score_chain(chain, chain)
    assert float(perfect.lddt_ca) == 1 and float(perfect.tm_score) == pytest.approx(1, abs=1e-9)
    noise = np.random.default_rng(0).normal(size=chain.positions.shape).astype(np.float32)
    found = score_chain(replace(chain, positions=chain.positions + noise), chain)
    assert 0.3 < float(found.lddt_ca) < 0.8 and 0.5 < float(found.rmsd_ca) < 3


def test_a_prediction_of_what_was_seen_alone_is_scored_too(chain: Chain) -> None:
    seen = np.flatnonzero(chain.mask.any(-1))[3:]
    mask = chain.mask.copy()
    mask[: seen[0]] = 0
    truth = replace(chain, mask=mask)
    part = Chain(
        name="A",
        sequence="".join(chain.sequence[i] for i in seen),
        positions=chain.positions[seen],
        mask=chain.mask[seen],
    )
    assert len(part.sequence) < len(truth.sequence)
    assert float(score_chain(part, truth).lddt_ca) == 1
    with pytest.raises(FoldDataError, match="the prediction is of"):
        score_chain(replace(part, sequence="A" * len(part.sequence)), truth)


def test_a_folder_is_scored_and_what_cannot_be_is_named(tmp_path: Path) -> None:
    predictions = tmp_path / "predictions"
    predictions.mkdir()
    text = gzip.decompress((REAL / "1ubq.cif.gz").read_bytes())
    for name in ("1ubq_A", "1a8o_A", "9zzz_A"):
        (predictions / f"{name}.cif").write_bytes(text)
    shutil.copy(predictions / "1ubq_A.cif", predictions / "1ubq_A.mmcif")
    found = evaluate(predictions, REAL)
    assert list(found.scores) == ["1ubq_A"] and found.scores["1ubq_A"]["lddt_ca"] == 1
    reasons = {each["name"]: each["reason"] for each in found.problems}
    assert "the prediction is of" in reasons["1a8o_A"] and "neither 9zzz_A" in reasons["9zzz_A"]
    assert found.to_dict()["means"]["gdt_ts"] == 1
    with pytest.raises(FoldDataError, match="has no prediction"):
        evaluate(tmp_path, REAL)
