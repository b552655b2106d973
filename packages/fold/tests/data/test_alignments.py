"""Alignments of 2Q2K and hits of HH-suite against AlphaFold's parsers, and what is no alignment."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fivefold.fold.data.alignments import (
    join,
    parse_a3m,
    parse_fasta,
    parse_stockholm,
    query_only,
    read_alignment,
    sequence_of,
)
from fivefold.fold.errors import FoldDataError

FILES = ("uniref90_hits.sto", "bfd_uniclust_hits.a3m", "mgnify_hits.sto", "uniprot_hits.sto")


@pytest.mark.parametrize("name", FILES)
def test_features_equal_alphafold(name: str, real: Path, data_goldens: Any, digest: Any) -> None:
    golden = data_goldens["alignments"][name]
    alignment = read_alignment(real / f"alignments/2q2k_A/{name}.gz")
    assert list(alignment.classes.shape) == golden["shape"]
    assert digest(alignment.classes) == golden["classes"]
    assert int(alignment.deletions.sum()) == golden["num_deletions"]
    assert digest(alignment.deletions) == golden["deletions"]
    assert len(alignment.names) == len(alignment)


def test_joined_alignments_equal_alphafold(real: Path, data_goldens: Any, digest: Any) -> None:
    golden = data_goldens["alignments"]["joined"]
    parts = [read_alignment(real / f"alignments/2q2k_A/{name}.gz") for name in FILES[:3]]
    every = join(parts, unique=False)
    assert digest(every.classes) == golden["classes"]
    assert digest(every.deletions) == golden["deletions"]
    unique = join(parts)
    first = golden["first_of_equals"]
    assert 1 < len(first) < len(every)
    np.testing.assert_array_equal(unique.classes, every.classes[first])
    np.testing.assert_array_equal(unique.deletions, every.deletions[first])
    assert unique.names == tuple(every.names[i] for i in first)


def test_a_single_sequence_equals_alphafold(data_goldens: Any, digest: Any) -> None:
    sequence = data_goldens["structures"]["1ubq"]["chains"]["A"]["sequence"]
    alignment = query_only(sequence)
    assert digest(alignment.classes) == data_goldens["alignments"]["1ubq"]["classes"]
    assert sequence_of(alignment) == sequence


def test_deletions_count_before_the_next_column() -> None:
    alignment = parse_a3m(">q\nACDE\n>one\nabA-cdeDEf\n>two\n.A.C-.E\n")
    assert alignment.deletions.tolist() == [[0] * 4, [2, 0, 3, 0], [0] * 4]
    assert alignment.classes.tolist() == [[0, 4, 3, 6], [0, 21, 3, 6], [0, 4, 21, 6]]
    assert alignment.names == ("q", "one", "two")


def test_stockholm_goes_on_in_blocks() -> None:
    text = "# STOCKHOLM 1.0\n#=GS x DE y\n\nq  A-C\nx  WWC\n\nq  D.E\nx  -kX\n//\n"
    alignment = parse_stockholm(text)
    assert sequence_of(alignment) == "ACDE"
    assert alignment.deletions.tolist() == [[0] * 4, [0, 1, 0, 1]]
    assert alignment.classes[1].tolist() == [17, 4, 21, 20]


def test_letters_of_other_databases() -> None:
    assert parse_a3m(">q\nBZUJOX-").classes.tolist() == [[3, 6, 4, 20, 20, 20, 21]]


def test_comments_and_zero_bytes_of_colabfold() -> None:
    assert parse_a3m("#4\t1\n>101\nACDE\n\0").classes.tolist() == [[0, 4, 3, 6]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no sequence"),
        (">q\n", "no sequence, or of an empty one"),
        ("ACD\n>q", "stands before the first"),
        (">q\nACD\n>other one\nAC\n", r"row 1 \('other one'\) has 2 columns, the query 3"),
        (">q\nACD\n>r\nA*D\n", r"row 1 \('r'\) has '\*' at 2"),
    ],
)
def test_what_is_no_a3m_is_named(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "hits.a3m"
    path.write_text(text)
    with pytest.raises(FoldDataError, match=r"hits\.a3m cannot be read: .*" + said):
        read_alignment(path)


def test_what_is_no_stockholm_is_named() -> None:
    with pytest.raises(FoldDataError, match="is no name with a sequence"):
        parse_stockholm("q ACD 7")
    with pytest.raises(FoldDataError, match="'r' has 2 columns, the first sequence 3"):
        parse_stockholm("q ACD\nr AC\n")
    with pytest.raises(FoldDataError, match=r"is none of \.a3m"):
        read_alignment("hits.txt")


def test_alignments_of_different_queries_do_not_join() -> None:
    with pytest.raises(FoldDataError, match="alignment 1 is of 'ACE', the first of 'ACD'"):
        join([query_only("ACD"), query_only("ACE")])
    with pytest.raises(FoldDataError, match="no alignment was given"):
        join([])


def test_fasta() -> None:
    assert parse_fasta(">a b\nAC\n\nDE\n>c\n") == [("a b", "ACDE"), ("c", "")]
