"""An interrupted run goes on as if it had not been, under its own layout or another."""

import os
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from fivefold.moe.cli import main
from fivefold.moe.export import read_run
from fivefold.parallel_core.checkpoint import Checkpoints
from fivefold.parallel_core.training.loop import Trainer

from .runs import ONE_RANK, TWO_RANKS, arguments, losses, records


@pytest.fixture(scope="module")
def killed_run(run_file: Path) -> Path:
    """A run of which rank 5 was killed in the fifth step, two after the last checkpoint."""
    folder, train_step = run_file.parent / "killed", Trainer.train_step

    def die(trainer: Trainer) -> bool:
        if (trainer.topology.world_rank, trainer.step) == (5, 4):
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", die)
        assert train(run_file, folder, 8, {}) == 1
    return folder


def train(run_file: Path, folder: Path, nproc: int, overrides: Mapping[str, str]) -> int:
    words = ["train", "--config", str(run_file), "--run", str(folder), "--nproc", str(nproc)]
    return main([*words, *arguments(overrides)])


def copy_of(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_a_killed_rank_ends_the_job(
    run_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def die(trainer: Trainer) -> bool:
        if trainer.topology.world_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)  # as in a collective that waits for the other rank
        return False

    monkeypatch.setattr(Trainer, "train_step", die)
    start = time.monotonic()
    assert train(run_file, tmp_path, 2, TWO_RANKS) == 1
    assert time.monotonic() - start < 30
    error = capfd.readouterr().err
    assert error.startswith("fivefold-moe: error: rank 1 of 2 was killed by signal 9 (SIGKILL)")
    assert error.count("\n") == 1


def test_a_killed_run_keeps_its_checkpoint(killed_run: Path) -> None:
    assert Checkpoints(killed_run / "checkpoints").steps() == [3]
    assert [record["step"] for record in records(killed_run) if "loss" in record][:3] == [1, 2, 3]


def test_the_same_layout_goes_on_exactly(
    run_file: Path, finished_run: Path, killed_run: Path, tmp_path: Path
) -> None:
    run = copy_of(killed_run, tmp_path)
    half = run / "checkpoints" / "step-00000006.partial"  # as a kill while saving leaves it
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"cut")
    assert train(run_file, run, 8, {}) == 0
    assert Checkpoints(run / "checkpoints").steps() == [3, 6]
    assert not half.exists()
    assert losses(run) == losses(finished_run)
    norms = [[r["grad_norm"] for r in records(x) if "grad_norm" in r] for x in (run, finished_run)]
    assert norms[0] == norms[1]


@pytest.mark.parametrize(
    ("nproc", "overrides"),
    [
        (8, {"layout.cp": "2", "layout.etp": "2", "layout.ep": "4", "layout.pp": "1"}),
        (4, {"layout.tp": "1", "layout.pp": "2", "layout.etp": "2", "layout.ep": "1"}),
        (2, TWO_RANKS),
        (1, ONE_RANK),
    ],
)
def test_another_layout_goes_on(
    nproc: int,
    overrides: dict[str, str],
    run_file: Path,
    finished_run: Path,
    killed_run: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = copy_of(killed_run, tmp_path)
    assert train(run_file, run, nproc, overrides) == 0
    assert "going on after step 3\n" in capfd.readouterr().err
    expected = losses(finished_run)
    assert losses(run) == pytest.approx(expected, abs=1e-5, rel=0)
    assert {k: v for k, v in losses(run).items() if k[0] <= 2} == {
        k: v for k, v in expected.items() if k[0] <= 2
    }


def test_a_finished_run_is_left_as_it_is(
    run_file: Path, finished_run: Path, tmp_path: Path
) -> None:
    run = copy_of(finished_run, tmp_path)
    assert train(run_file, run, 1, ONE_RANK) == 0
    assert Checkpoints(run / "checkpoints").steps() == [3, 6]
    assert losses(run) == pytest.approx(losses(finished_run), abs=1e-5, rel=0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"training.global_batch_size": "16", "training.seed": "4"},
            "step-00000006 is of a run with seed=0, global_batch_size=8, this one has "
            "seed=4, global_batch_size=16; resume with the same values, or train into another",
        ),
        ({"data.heldout_fraction": "0.1"}, "is of a run with data="),
        (
            {"model.hidden_size": "32", "model.num_layers": "1"},
            "is of a run with model.hidden_size=16, model.num_layers=2, this one has "
            "model.hidden_size=32, model.num_layers=1; resume with the same values",
        ),
        ({"model.num_layers": "3"}, "model.num_layers=3; resume"),
        ({"model.num_attention_heads": "2"}, "this one has model.num_attention_heads=2"),
        ({"model.num_experts_per_token": "1"}, "model.num_experts_per_token=1; resume"),
        ({"model.rope_theta": "100"}, "model.rope_theta=100.0; resume"),
        ({"model.tie_word_embeddings": "true"}, "model.tie_word_embeddings=True; resume"),
        ({"model.sliding_window": "4"}, "model.sliding_window=4; resume"),
        ({"training.steps": "5"}, "is after step 6, but training ends at steps=5; ask for at"),
    ],
)
def test_a_run_of_other_data_or_shape_does_not_go_on(
    overrides: dict[str, str],
    message: str,
    run_file: Path,
    finished_run: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = copy_of(finished_run, tmp_path)
    assert train(run_file, run, 1, ONE_RANK | overrides) == 1
    error = capfd.readouterr().err
    assert error.startswith("fivefold-moe: error: rank 0 of 1: ")
    assert message in error
    assert error.count("\n") == 1
    assert losses(run) == losses(finished_run)
    assert read_run(run) == read_run(finished_run)
