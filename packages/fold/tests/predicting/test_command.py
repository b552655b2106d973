"""``predict`` and ``evaluate``, as a user calls them."""

import json
from pathlib import Path

import pytest

from fivefold.fold.cli import main
from fivefold.fold.data.structures import read_structure
from fivefold.fold.model.alphafold import AlphaFold

REAL = Path(__file__).parents[1] / "real"


@pytest.fixture
def words(tiny_model: AlphaFold, tmp_path: Path) -> list[str]:
    """The options that every prediction has."""
    tiny_model.save_pretrained(tmp_path / "model")
    few = ["--num-recycles", "0", "--max-msa-clusters", "8", "--max-extra-msa", "4"]
    out = ["--out", str(tmp_path / "out"), "--device", "cpu"]
    return ["predict", "--params", str(tmp_path / "model"), *few, *out]


def test_a_structure_is_predicted_compared_and_scored(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--mmcif", str(REAL / "structures/1ubq.cif.gz")]) == 0
    told = capsys.readouterr().out
    assert "1ubq_A: 76 residues, mean pLDDT" in told and "lDDT-CA" in told
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"1ubq_A.{suffix}" for suffix in ("cif", "json", "pdb", "png")]
    report = json.loads((tmp_path / "out/1ubq_A.json").read_text())
    scored = ["evaluate", "--predictions", str(tmp_path / "out")]
    scored += ["--structures", str(REAL / "structures"), "--json", str(tmp_path / "x.json")]
    assert main(scored) == 0
    found = json.loads((tmp_path / "x.json").read_text())["scores"]["1ubq_A"]
    for name, value in report["scores"].items():
        assert found[name] == pytest.approx(value, abs=2e-3, rel=1e-3)


def test_sequences_and_alignments_are_predicted(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "x.fasta").write_text(">a\nMQIFVK\n>b\nTLTG\n")
    assert main([*words, "--fasta", str(tmp_path / "x.fasta")]) == 0
    paths = [str(path) for path in sorted((REAL / "alignments/2q2k_A").glob("*.gz"))]
    assert main([*words, "--a3m", *paths, "--chunk-size", "16"]) == 0
    assert {path.stem for path in (tmp_path / "out").glob("*.pdb")} == {
        "a",
        "b",
        "bfd_uniclust_hits",
    }


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "needs --fasta, --a3m or --mmcif"),
        (["--fasta", "x", "--a3m", "y"], "needs --fasta, --a3m or --mmcif"),
        (["--fasta", "x", "--chain", "A"], "--chain is of a structure"),
        (["--fasta", "x", "--chunk-size", "0"], "at least 1, found 0"),
        (["--a3m", "x", "--hhr", "y"], "all three"),
        (["--fasta", "none.fasta"], "none.fasta cannot be read"),
    ],
)
def test_faults_are_said(
    words: list[str], more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, *more]) == 1
    assert message in capsys.readouterr().err


def test_templates_of_hits_reach_the_network(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    letters = read_structure(REAL / "structures/1ubq.cif.gz").chain("A").sequence
    (tmp_path / "q.a3m").write_text(f">q\n{letters}AAAAA\n")
    hits = "No 1\n>1UBQ_A Ubiquitin\nProbab=99.9 Aligned_cols=76 Sum_probs=70.0\n\n"
    hits += f"Q q 1 {letters} 76 (81)\nT 1UBQ_A 1 {letters} 76 (76)\n"
    (tmp_path / "q.hhr").write_text(hits)
    with_hits = ["--hhr", str(tmp_path / "q.hhr"), "--templates", str(REAL / "structures")]
    found = []
    for more in ([], with_hits):
        assert main([*words, "--a3m", str(tmp_path / "q.a3m"), *more]) == 0
        found.append((tmp_path / "out/q.pdb").read_text())
    assert "templates of q: 1UBQ_A" in capsys.readouterr().out
    assert found[0] != found[1]
