"""Structures of hits lie over the query where the hits say, and nothing else does."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fivefold.fold.config import FeatureConfig
from fivefold.fold.data.alignments import query_only
from fivefold.fold.data.features import Example, prediction_features
from fivefold.fold.data.hhr import Hit
from fivefold.fold.data.structures import read_structure
from fivefold.fold.data.templates import TemplateFilters, find_templates
from fivefold.fold.errors import FoldDataError
from fivefold.fold.geometry.residues import GAP

STRUCTURES = Path(__file__).parents[1] / "real" / "structures"
UBIQUITIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"


def hit(**changes: object) -> Hit:
    """Residues 5 to 44 of ubiquitin under 3 to 42 of a query, and one gap on each side."""
    query = "-".join(("A" * 20, "A" * 20))
    own = UBIQUITIN[4:24] + UBIQUITIN[24] + "-" + UBIQUITIN[25:44]
    found = Hit(
        rank=1,
        name="1UBQ_A Ubiquitin; 1.8A",
        aligned_columns=39,
        sum_probs=30.0,
        query=query,
        sequence=own,
        query_index=(*range(2, 22), -1, *range(22, 42)),
        index=(*range(4, 25), -1, *range(25, 44)),
    )
    return replace(found, **changes)


def test_a_hit_is_laid_over_the_query() -> None:
    found = find_templates([hit()], "A" * 50, STRUCTURES)
    assert found.names == ["1UBQ_A"] and not found.dropped and found.templates is not None
    chain = read_structure(STRUCTURES / "1ubq.cif.gz").chain("A")
    pairs = [(q, h) for q, h in zip(hit().query_index, hit().index, strict=True) if min(q, h) >= 0]
    assert len(pairs) == 39
    aligned = np.zeros(50, bool)
    for query, own in pairs:
        aligned[query] = True
        assert found.templates.aatype[0, query] == chain.aatype[own]
        np.testing.assert_array_equal(found.templates.positions[0, query], chain.positions[own])
        np.testing.assert_array_equal(found.templates.mask[0, query], chain.mask[own])
    assert (found.templates.aatype[0].numpy()[~aligned] == GAP).all()
    assert not found.templates.mask[0].numpy()[~aligned].any()
    example = Example(
        name="q", sequence="A" * 50, alignment=query_only("A" * 50), templates=found.templates
    )
    (features,) = prediction_features(example, FeatureConfig(max_templates=2))
    assert features["template_mask"].tolist() == [1.0, 0.0]


def test_a_hit_that_differs_from_its_entry_is_aligned_anew() -> None:
    text = hit().sequence
    changed = replace(hit(), sequence="G" + text[1:])
    (one, other) = (find_templates([each], "A" * 50, STRUCTURES) for each in (hit(), changed))
    assert one.templates is not None and other.templates is not None
    np.testing.assert_array_equal(one.templates.mask[:, 3:], other.templates.mask[:, 3:])


@pytest.mark.parametrize(
    ("found", "filters", "reason"),
    [
        (hit(aligned_columns=5), {}, "10% of the query"),
        (hit(name="9XYZ_A x"), {}, "no 9xyz of any suffix"),
        (hit(name="1UBQ_B x"), {}, "no protein chain 'B'"),
        (hit(), {"released_before": "1987-01-01"}, "released 1987"),
        (hit(), {"min_length": 60}, "at least 60"),
        (hit(sequence="W" * 21 + "-" + "W" * 19), {}, "residues of the hit are in its structure"),
    ],
)
def test_what_is_left_out_is_named(found: Hit, filters: dict[str, object], reason: str) -> None:
    made = find_templates([found], "A" * 50, STRUCTURES, TemplateFilters(**filters))
    assert made.templates is None and made.names == []
    assert reason in made.dropped[0]["reason"]


def test_the_query_itself_and_second_hits_are_left_out() -> None:
    same = hit(sequence=UBIQUITIN, query=UBIQUITIN, query_index=tuple(range(76)),
               index=tuple(range(76)), aligned_columns=76)  # fmt: skip
    made = find_templates([same], UBIQUITIN, STRUCTURES)
    assert made.dropped[0]["reason"] == "it is the query itself"
    made = find_templates([hit(), hit(sum_probs=40.0)], "A" * 50, STRUCTURES)
    assert made.names == ["1UBQ_A"] and "same chain" in made.dropped[0]["reason"]


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FoldDataError, match=r"none\.hhr cannot be read"):
        find_templates(tmp_path / "none.hhr", "A", STRUCTURES)
