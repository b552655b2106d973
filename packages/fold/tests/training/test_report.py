"""The curves of a run, from its metrics."""

from pathlib import Path

import pytest

from fivefold.fold.training.report import CURVE, FoldReport, plot_run
from fivefold.parallel_core.errors import DataError
from fivefold.parallel_core.training.metrics import read_jsonl


def test_a_report_keeps_shows_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FoldReport(tmp_path, 3) as report:
        for step in range(1, 4):
            report(step, {"loss": 4.0 / step, "lddt_ca": 0.1 * step})
        report(3, {"heldout_lddt_ca": 0.25})
    assert "step 3: lDDT-CA 0.250" in capsys.readouterr().err
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 4
    assert (tmp_path / CURVE).read_bytes()[:4] == b"\x89PNG"


def test_a_run_without_a_step_has_no_curve(tmp_path: Path) -> None:
    with FoldReport(tmp_path, 3):
        pass
    assert not (tmp_path / CURVE).exists()
    with pytest.raises(DataError, match="none of its 0 records has a loss"):
        plot_run(tmp_path / "metrics.jsonl", tmp_path / "x.png")
