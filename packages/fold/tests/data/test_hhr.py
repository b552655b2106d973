"""Hits of HH-suite's files against AlphaFold's parser."""

import hashlib
from typing import Any

import pytest

from fivefold.fold.data.hhr import parse_hhr
from fivefold.fold.errors import FoldDataError


@pytest.mark.parametrize("name", ["4p79_hhsearch_server_NOssm.hhr", "hhpred_9590198.hhr"])
def test_hits_equal_alphafold(name: str, unpacked: Any, data_goldens: Any) -> None:
    golden = data_goldens["hits"][name]
    found = parse_hhr(unpacked(f"hits/{name}.gz"))
    assert len(found) == len(golden) > 1
    for hit, (rank, columns, sum_probs, digest) in zip(found, golden, strict=True):
        assert (hit.rank, hit.aligned_columns, hit.sum_probs) == (rank, columns, sum_probs)
        fields = (hit.name, hit.query, hit.sequence, list(hit.query_index), list(hit.index))
        assert hashlib.sha256(repr(fields).encode()).hexdigest()[:24] == digest


def test_a_file_without_hits() -> None:
    assert parse_hhr("Query  x\nMatch_columns 10\n\n No Hit  Prob\n") == []


def test_damage_is_named(unpacked: Any) -> None:
    text = unpacked("hits/hhpred_9590198.hhr.gz")
    with pytest.raises(FoldDataError, match="hit 1 has no line with Aligned_cols"):
        parse_hhr(text.replace("Aligned_cols", "Columns"))
    rows = [line for line in text.splitlines() if line.startswith("Q ") and "(" in line]
    row = next(line for line in rows if "Consensus" not in line)
    letters = row.split()[3]
    with pytest.raises(FoldDataError, match=r"hit 1 has a row of .* residues that is numbered"):
        parse_hhr(text.replace(row, row.replace(letters, "-" + letters[1:]), 1))
