"""What a run leaves behind and says: its metrics file, its curve and its lines of progress."""

import sys
from pathlib import Path

import pytest

from fivefold.parallel_core.training.metrics import read_jsonl
from fivefold.parallel_core.training.report import CURVE, METRICS, RunReport

PNG = b"\x89PNG\r\n\x1a\n"


def run(folder: Path, first: int, last: int) -> None:
    """Report the steps from ``first`` to ``last``, as a run that resumes before them."""
    with RunReport(folder, 4, first - 1) as report:
        for step in range(first, last + 1):
            report(step, {"loss": 4.0 / step})


def test_every_measurement_is_kept_with_its_step(tmp_path: Path) -> None:
    with RunReport(tmp_path, 2) as report:
        report(1, {"loss": 3.0, "grad_norm": 0.5})
        assert read_jsonl(tmp_path / METRICS) == [{"step": 1, "loss": 3.0, "grad_norm": 0.5}]
        report(2, {"loss": 2.0})
        report(2, {"heldout_loss": 2.5})
    assert read_jsonl(tmp_path / METRICS) == [
        {"step": 1, "loss": 3.0, "grad_norm": 0.5},
        {"step": 2, "loss": 2.0},
        {"step": 2, "heldout_loss": 2.5},
    ]


def test_the_curve_is_drawn_at_the_end_also_of_a_run_that_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the run failed"), RunReport(tmp_path, 2) as report:
        report(1, {"loss": 3.0})
        assert not (tmp_path / CURVE).exists()
        raise RuntimeError("the run failed")
    assert (tmp_path / CURVE).read_bytes().startswith(PNG)
    assert [record["step"] for record in read_jsonl(tmp_path / METRICS)] == [1]


def test_without_matplotlib_a_run_has_all_but_the_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run(tmp_path, 1, 2)
    assert len(read_jsonl(tmp_path / METRICS)) == 2
    assert not (tmp_path / CURVE).exists()


def test_a_resumed_run_replaces_the_records_after_its_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, 1, 3)
    assert "going on" not in capsys.readouterr().err
    run(tmp_path, 3, 4)
    assert [record["step"] for record in read_jsonl(tmp_path / METRICS)] == [1, 2, 3, 4]
    assert "going on after step 2\n" in capsys.readouterr().err


def test_only_losses_of_training_count_as_steps_of_progress(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunReport(tmp_path, 3) as report:
        report(1, {"loss": 2.5})
        report(1, {"heldout_loss": 2.75, "heldout_bits_per_byte": 1.23456})
        report(2, {"loss": 2.25})
    lines = capsys.readouterr().err.splitlines()
    assert "step 1: 1.235 bits per byte on held-out text" in lines
    assert lines[0].startswith("step 1/3 (33.3%), loss 2.5")
    assert lines[-1].startswith("step 2/3 (66.7%), loss 2.25")


def test_a_run_that_fails_before_its_first_loss_says_why(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunReport(tmp_path, 3):
        raise ZeroDivisionError
    assert not (tmp_path / "loss.png").exists()
