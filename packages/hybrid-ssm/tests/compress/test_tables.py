"""Tables and pictures of the stages."""

import json
import sys
from pathlib import Path

import pytest

from fivefold.hybrid_ssm.compress import plots
from fivefold.hybrid_ssm.compress.tables import read_table, write_table
from fivefold.hybrid_ssm.errors import HybridError


def test_a_table_is_both_json_and_csv(tmp_path: Path) -> None:
    rows = [{"layers": [1, 2], "width": 3, "kl": 0.5}, {"layers": [4], "width": 5, "kl": 0.25}]
    assert read_table(tmp_path / "table") is None
    write_table(tmp_path / "table", rows)
    assert read_table(tmp_path / "table") == rows
    assert (tmp_path / "table.csv").read_text() == "layers,width,kl\n1 2,3,0.5\n4,5,0.25\n"


@pytest.mark.parametrize("text", ["[1", "{}"])
def test_what_is_no_table(text: str, tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(HybridError, match=r"table\.json is not a table: .*delete it"):
        read_table(tmp_path / "table")


def test_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"candidate": i, "memory_bytes": 2**20 + i, "agreement": 0.5} for i in range(3)]
    records = [{"step": 1, "loss": 2.0}, {"step": 1, "heldout_loss": 1.0}]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    calls = (
        (plots.plot_importance, "M-*", [0.1, 0.0, 0.3], tmp_path / "a.png"),
        (plots.plot_candidates, rows, [1], tmp_path / "b.png"),
        (plots.plot_distillation, {"first": metrics}, tmp_path / "c.png"),
    )
    for call in calls:
        plots.draw(*call)
        assert call[-1].read_bytes().startswith(b"\x89PNG")
        call[-1].unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for call in calls:
        plots.draw(*call)
        assert not call[-1].exists()
