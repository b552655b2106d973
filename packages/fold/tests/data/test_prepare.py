"""Preparing real files among broken ones: what is left out is named; a killed run goes on."""

import argparse
import gzip
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fivefold.fold.config import FeatureConfig
from fivefold.fold.data import prepare as module
from fivefold.fold.data.command import add_prepare, run_prepare
from fivefold.fold.data.dataset import Chains, TrainingSamples, sampling_weights
from fivefold.fold.data.prepare import Filters, prepare
from fivefold.fold.data.small import assemble
from fivefold.fold.data.structures import read_structure
from fivefold.fold.errors import FoldDataError


@pytest.fixture
def mixed(tmp_path: Path, real: Path) -> Path:
    """1UBQ without alignment, 2Q2K with one and an empty one, 1KD8 with unknowns, a broken file."""
    for name in ("1ubq", "2q2k", "1kd8"):
        target = tmp_path / f"structures/{name}.cif.gz"
        target.parent.mkdir(exist_ok=True)
        target.write_bytes((real / f"structures/{name}.cif.gz").read_bytes())
    (tmp_path / "structures/broken.cif").write_text("data_broken\nloop_\n_atom_site.id\n")
    folder = tmp_path / "alignments/2q2k_A"
    folder.mkdir(parents=True)
    for name in ("uniref90_hits.sto.gz", "bfd_uniclust_hits.a3m.gz"):
        (folder / name).write_bytes((real / "alignments/2q2k_A" / name).read_bytes())
    (tmp_path / "alignments/2q2k_B").mkdir()
    (tmp_path / "alignments/2q2k_B/hits.a3m").write_text("")
    return tmp_path


def run(mixed: Path, out: str = "out", **options: Any) -> module.Found:
    return prepare(
        mixed / "structures",
        mixed / out,
        alignments=mixed / "alignments",
        progress=False,
        **options,
    )


def test_what_is_left_out_is_named_and_the_run_goes_on(mixed: Path) -> None:
    found = run(mixed)
    dropped = {each["name"]: each["reason"] for each in found.dropped}
    assert set(dropped) == {"broken.cif"}
    assert "damaged" in dropped["broken.cif"]
    notes = [(each["name"], each["note"]) for each in found.notes]
    assert ("1ubq_A", "no alignment; the chain is its own") in notes
    assert ("1kd8_A", "unknown residues at 1 (1 in all)") in notes
    assert ("2q2k_B", "no alignment; the chain is its own") in notes
    empty = "hits.a3m cannot be read: an alignment of no sequence"
    assert [name for name, note in notes if "left out" in note and empty in note] == ["2q2k_B"]
    rows = {each["name"]: each["num_rows"] for each in found.chains}
    assert rows["2q2k_A"] == 17 and rows["1ubq_A"] == rows["2q2k_B"] == 1 and len(rows) == 9
    assert json.loads((mixed / "out/index.json").read_text())["dropped"] == found.dropped
    strict = run(mixed, "strict", filters=Filters(need_alignment=True, max_resolution=3.5))
    assert [each["name"] for each in strict.chains] == ["2q2k_A"]
    strict = run(mixed, "best", filters=Filters(max_resolution=1.82, max_single_residue=0.1))
    reasons = " ".join(each["reason"] for each in strict.dropped)
    assert "resolution 3.0 Å, below 1.82 is kept" in reasons
    assert "9 of 76 residues are of one kind" in reasons and not strict.chains


def test_a_search_that_found_nothing_does_not_cost_what_others_found(mixed: Path) -> None:
    (mixed / "alignments/2q2k_A/mgnify_hits.sto").write_text("# STOCKHOLM 1.0\n//\n")
    found = run(mixed)
    assert {each["name"]: each["num_rows"] for each in found.chains}["2q2k_A"] == 17
    notes = [each["note"] for each in found.notes if each["name"] == "2q2k_A"]
    assert len(notes) == 1 and "mgnify_hits.sto" in notes[0]


def test_a_killed_run_goes_on(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(mixed, "whole", files_per_shard=1)
    done = []
    write = module._write_shard

    def dies(job: Any) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(job[0].name)
        write(job)

    monkeypatch.setattr(module, "_write_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        run(mixed, files_per_shard=1)
    assert not (mixed / "out/index.json").exists()
    monkeypatch.setattr(module, "_write_shard", lambda job: (done.append(job[0].name), write(job)))
    assert run(mixed, files_per_shard=1) == whole
    assert sorted(done) == [f"shard-0000{n}.safetensors" for n in range(4)]
    for n in range(4):
        name = f"shard-0000{n}.safetensors"
        assert (mixed / "out" / name).read_bytes() == (mixed / "whole" / name).read_bytes()
    # A file that has changed is read again, and its shard alone.
    (mixed / "alignments/2q2k_B/hits.a3m").write_text(">another\nMKV\n")
    done.clear()
    changed = {each["name"]: each["reason"] for each in run(mixed, files_per_shard=1).dropped}
    assert "its alignment is of 'MKV'" in changed["2q2k_B"]
    assert len(done) == 1


def test_workers_write_the_same(mixed: Path) -> None:
    one = run(mixed, files_per_shard=2)
    two = run(mixed, "two", files_per_shard=2, num_workers=2)
    assert one == two
    for path in (mixed / "out").glob("*.safetensors"):
        assert path.read_bytes() == (mixed / "two" / path.name).read_bytes()


def test_chains_come_back_and_samples_follow_from_their_number(mixed: Path) -> None:
    run(mixed)
    chains = Chains(mixed / "out", ["1ubq_A", "2q2k_A"])
    expected = read_structure(mixed / "structures/1ubq.cif.gz").chain("A")
    found = chains[0]
    assert found.sequence == expected.sequence and found.resolution == 1.8
    assert found.chain is not None
    np.testing.assert_array_equal(found.chain.positions, expected.positions)
    np.testing.assert_array_equal(found.chain.mask, expected.mask)
    assert len(chains[1].alignment) == 17
    config = FeatureConfig(crop_size=16, max_msa_clusters=6, max_extra_msa=4)
    one, two = (TrainingSamples(chains, config, seed=1) for _ in range(2))
    ahead = two[7][0]["msa_feat"]
    assert [one.chain_of(n) for n in range(20)] == [two.chain_of(n) for n in range(20)]
    assert (one[7][0]["msa_feat"] == ahead).all()
    only = TrainingSamples(chains, config, weights=np.array([0.0, 1.0]))
    assert {only.chain_of(n) for n in range(20)} == {1}
    with pytest.raises(FoldDataError, match="has no chains 9xyz_A"):
        Chains(mixed / "out", ["9xyz_A"])
    with pytest.raises(FoldDataError, match="was not prepared"):
        Chains(mixed)


def test_clusters_and_weights(mixed: Path) -> None:
    run(mixed)
    chains = Chains(mixed / "out", ["1ubq_A", "1kd8_A", "1kd8_C", "1kd8_F", "1kd8_B"])
    assert chains.cluster_sizes() == [1, 3, 3, 3, 3 - 2]
    (mixed / "clusters.txt").write_text("1UBQ_A 9XYZ_B\n1KD8_A 1KD8_C 1KD8_F 1KD8_B\n")
    assert chains.cluster_sizes(mixed / "clusters.txt") == [2, 4, 4, 4, 4]
    lengths, sizes = [100, 384, 1000], [1, 4, 4]
    raw = np.array([0.5, 0.75 / 4, 1 / 4])
    np.testing.assert_allclose(sampling_weights(lengths, sizes, "alphafold"), raw / raw.sum())
    raw = np.array([0.5, 0.75 / 2, 1 / 2])
    np.testing.assert_allclose(sampling_weights(lengths, sizes, "mlperf"), raw / raw.sum())
    assert sampling_weights(lengths, sizes, "uniform").tolist() == [1 / 3] * 3


def make_wheel(mixed: Path) -> Path:
    wheel = mixed / "made-1.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        text = gzip.decompress((mixed / "structures/1ubq.cif.gz").read_bytes())
        archive.writestr("made/tests/mmcifs/1ubq.cif", text)
        archive.writestr("made/tests/alignments/1ubq_A/hits.a3m", ">q\nMQ\n")
        archive.writestr("made/tests/alignments/1ubq_A/hmm_output.sto", "x")
        archive.writestr("made/other.cif", "x")
    return wheel


def test_the_small_set_from_a_wheel(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel = make_wheel(mixed)
    raw = assemble(mixed / "raw", [wheel])
    files = sorted(str(p.relative_to(raw)) for p in raw.rglob("*") if p.is_file())
    assert files == ["alignments/1ubq_A/hits.a3m", "structures/1ubq.cif"]
    parser = argparse.ArgumentParser()
    add_prepare(parser)
    out = str(mixed / "small")
    command = ["--small", "--wheel", str(wheel), "--out", out]
    assert run_prepare(parser.parse_args(command)) == 1  # its only alignment is of something else
    assert "left out 1ubq_A: its alignment is of 'MQ'" in capsys.readouterr().out
    folder = str(mixed / "structures")
    assert run_prepare(parser.parse_args(["--structures", folder, "--out", out])) == 0
    assert "9 chains kept, 1 left out" in capsys.readouterr().out
    for wrong in (["--out", out], ["--small", "--structures", folder, "--out", out]):
        with pytest.raises(FoldDataError, match="--structures FOLDER or --small, one of them"):
            run_prepare(parser.parse_args(wrong))
    with pytest.raises(FoldDataError, match="is no wheel"):
        assemble(mixed / "raw", [mixed / "structures/broken.cif"])


def test_folders_that_are_not_there(tmp_path: Path, mixed: Path) -> None:
    with pytest.raises(FoldDataError, match="has no structure; looked for"):
        prepare(tmp_path / "none", tmp_path / "out")
    with pytest.raises(FoldDataError, match="there is no folder"):
        prepare(mixed / "structures", tmp_path / "out", alignments=tmp_path / "none")


def test_options_need_no_torch() -> None:
    code = (
        "import sys, argparse; from fivefold.fold.data.command import add_prepare; "
        "add_prepare(argparse.ArgumentParser()); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_templates_of_hits_come_with_the_chain(mixed: Path) -> None:
    letters = read_structure(mixed / "structures/1ubq.cif.gz").chain("A").sequence
    query = read_structure(mixed / "structures/2q2k.cif.gz").chain("A").sequence
    num = len(query)
    hits = f"No 1\n>1UBQ_A Ubiquitin\nProbab=9 Aligned_cols={num} Sum_probs=7.0\n\n"
    hits += f"Q q 1 {query} {num} ({num})\nT 1UBQ_A 1 {letters[:num]} {num} (76)\n"
    (mixed / "alignments/2q2k_A/q.hhr").write_text(hits)
    run(mixed)
    assert Chains(mixed / "out", ["2q2k_A"])[0].templates is None
    run(mixed, templates=mixed / "structures")
    templates = Chains(mixed / "out", ["2q2k_A"])[0].templates
    assert templates is not None and templates.aatype.shape == (1, num)
    truth = read_structure(mixed / "structures/1ubq.cif.gz").chain("A").positions[:num]
    np.testing.assert_array_equal(templates.positions[0].numpy(), truth)
    assert Chains(mixed / "out", ["1ubq_A"])[0].templates is None
