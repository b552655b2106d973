"""``train`` and ``export``, as a user calls them: ranks, resuming, networks for others."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from fivefold.fold import AlphaFold
from fivefold.fold.cli import main
from fivefold.parallel_core.training.metrics import read_jsonl

REAL = Path(__file__).parents[1] / "real"
RUN = """
preset = "small"
[model]
template = "none"
c_m = 8
c_z = 8
c_s = 8
c_e = 8
[features]
crop_size = 10
max_msa_clusters = 2
max_extra_msa = 2
max_templates = 0
num_recycles = 0
[data]
structures = "structures"
alignments = "alignments"
prepared = "prepared"
heldout = ["1a8o_A"]
[training]
steps = 2
global_batch_size = 2
schedule = {{ learning_rate = 1e-3 }}
{more}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two chains, a broken file, and an alignment that is empty."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "structures").mkdir()
    for name in ("1ubq", "1a8o", "1kd8"):
        shutil.copy(REAL / "structures" / f"{name}.cif.gz", "structures")
    Path("structures/9bad.cif").write_text("data_9BAD\nloop_\n_atom_site.id\n")
    Path("alignments/1kd8_A").mkdir(parents=True)
    Path("alignments/1kd8_A/empty.a3m").write_text("")
    Path("run.toml").write_text(RUN.format(more=""))
    return tmp_path


def test_a_run_names_what_it_leaves_out_and_leaves_a_network(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--config", "run.toml", "--run", "r", "--nproc", "2"]) == 0
    told = capsys.readouterr().out
    assert "left out 9bad.cif: 9bad.cif is damaged" in told
    assert "1kd8_A: left out: alignments/1kd8_A/empty.a3m cannot be read" in told
    assert "1kd8_A: no alignment; the chain is its own" in told
    assert "1ubq_A: no alignment" in told and "1kd8_B: unknown residues at 1" in told
    assert "1 held-out ones to score, 2 ranks" in told
    records = read_jsonl("r/metrics.jsonl")
    assert [r["step"] for r in records if "loss" in r] == [1, 2]
    assert 0 <= records[-1]["heldout_lddt_ca"] <= 1
    assert Path("r/curve.png").stat().st_size > 1000
    assert main(["train", "--config", "run.toml", "--run", "r", "--set", "training.steps=3"]) == 0
    assert [r["step"] for r in read_jsonl("r/metrics.jsonl") if "loss" in r] == [1, 2, 3]
    words = ["export", "--run", "r", "--style", "alphafold", "--output", "params.npz"]
    assert main(words) == 0
    model = AlphaFold.from_pretrained("r/model")
    theirs = np.load("params.npz")[
        "alphafold/alphafold_iteration/evoformer/single_activations//bias"
    ]
    np.testing.assert_array_equal(theirs, model.linear_single.bias.detach().numpy())


def test_faults_are_said_before_anything_starts(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--config", "run.toml", "--run", "r", "--nproc", "3"]) == 1
    assert "does not divide over 3 ranks" in capsys.readouterr().err
    assert main(["train", "--config", "run.toml", "--nproc", "2", "--dap", "4"]) == 1
    assert "dap=4 does not divide 2 ranks" in capsys.readouterr().err
    assert main(["train", "--config", "run.toml", "--set", "model.depth=3"]) == 1
    assert "model.depth" in capsys.readouterr().err
    assert main(["export", "--output", "x"]) == 1
    assert "--run FOLDER or --params PATH" in capsys.readouterr().err
    assert not Path("r").exists()


def test_ranks_share_samples(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--config", "run.toml", "--set", "training.steps=1"]
    assert main([*words, "--run", "alone"]) == 0
    assert main([*words, "--run", "shared", "--nproc", "2", "--dap", "2"]) == 0
    assert "2 ranks, 2 to a sample" in capsys.readouterr().out
    alone, shared = (
        next(r for r in read_jsonl(f"{run}/metrics.jsonl") if "loss" in r)
        for run in ("alone", "shared")
    )
    for name in ("loss", "sample_norm", "lddt_ca", "clipped"):
        assert shared[name] == pytest.approx(alone[name], rel=1e-4), name


def test_a_dry_run_trains_nothing(folder: Path) -> None:
    assert main(["train", "--config", "run.toml", "--run", "r", "--dry-run"]) == 0
    assert not Path("r").exists() and Path("prepared/index.json").exists()
