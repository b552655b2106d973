"""Sequences, alignments and structures as what is to be predicted."""

from pathlib import Path

import pytest

from fivefold.fold.errors import FoldDataError
from fivefold.fold.predicting.inputs import (
    file_name,
    from_alignments,
    from_fasta,
    from_structure,
)

REAL = Path(__file__).parents[1] / "real"


def test_each_sequence_of_a_fasta_file(tmp_path: Path) -> None:
    path = tmp_path / "x.fasta"
    path.write_text(">one|2 first\nACDEF\nGH\n>\nacdx*\n")
    one, two = from_fasta(path)
    assert (one.name, one.sequence, len(one.alignment)) == ("one_2", "ACDEFGH", 1)
    assert (two.name, two.sequence) == ("sequence-2", "ACDX")


@pytest.mark.parametrize(
    ("text", "message"), [("", "no sequence"), (">a\nAC1\n", "'a'"), ("ACD", "first that begins")]
)
def test_a_fasta_file_that_is_none_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.fasta"
    path.write_text(text)
    with pytest.raises(FoldDataError, match=message):
        list(from_fasta(path))


def test_alignments_of_one_query_are_joined() -> None:
    paths = sorted((REAL / "alignments/2q2k_A").iterdir())
    example = from_alignments(paths)
    assert len(example.alignment) > 10 and len(example.sequence) == 70


def test_chains_of_a_structure() -> None:
    path = REAL / "structures/2q2k.cif.gz"
    names = [example.name for example in from_structure(path)]
    assert names == ["2q2k_A", "2q2k_B"]
    paths = sorted((REAL / "alignments/2q2k_A").iterdir())
    (one,) = from_structure(path, ["A"], paths)
    assert one.chain is not None and len(one.alignment) > 10
    with pytest.raises(FoldDataError, match="name it with --chain"):
        list(from_structure(path, [], paths))


def test_names_are_of_files() -> None:
    assert file_name("sp|P0CG48|UBC_HUMAN x") == "sp_P0CG48_UBC_HUMAN"
    assert file_name("../..") == "" and file_name("  ") == ""
