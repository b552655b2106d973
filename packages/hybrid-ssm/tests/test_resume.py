"""An interrupted run goes on as if it had not been, under its own layout or another."""

import shutil
from pathlib import Path

import pytest

from fivefold.hybrid_ssm.cli import main

from .runs import ONE_RANK, TWO_STAGES, arguments, losses


@pytest.mark.parametrize(
    ("nproc", "overrides"), [("4", {}), ("2", TWO_STAGES), ("1", ONE_RANK)], ids=["4", "2", "1"]
)
def test_a_run_goes_on_under_any_layout(
    nproc: str, overrides: dict[str, str], run_file: Path, finished_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    words = ["train", "--config", str(run_file), "--run", str(run), "--nproc", nproc]
    assert main([*words, *arguments(overrides)]) == 0
    expected = losses(finished_run)
    assert losses(run) == (expected if nproc == "4" else pytest.approx(expected, abs=2e-5, rel=0))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.pattern": "M-E*M-"}, "model.pattern=M-E*M, this one has model.pattern=M-E*M-"),
        ({"packed": "false"}, "packed=True, this one has packed=False"),
    ],
)
def test_another_model_does_not_go_on(
    overrides: dict[str, str],
    message: str,
    run_file: Path,
    finished_run: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    words = ["train", "--config", str(run_file), "--run", str(run)]
    assert main([*words, *arguments(ONE_RANK | overrides)]) == 1
    assert message in capfd.readouterr().err
