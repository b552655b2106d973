import json
from pathlib import Path

import pytest
import torch

from fivefold.parallel_core.errors import DataError
from fivefold.parallel_core.training.expert_load import LoadFigures, plot_load


def test_figures_of_the_routers() -> None:
    sums = {
        "aux_loss": torch.tensor(3.0),
        "z_loss": torch.tensor(0.5),
        "load.0": torch.tensor([6, 2, 0, 0]),
        "dropped.0": torch.tensor(2),
        "load.10": torch.tensor([2, 2, 2, 2]),
        "dropped.10": torch.tensor(0),
    }
    found = LoadFigures(ep=2, edp=4, row_bytes=8)(sums, 2)
    assert found == {
        "aux_loss": 1.5,
        "z_loss": 0.25,
        "load_max_over_mean": 2.0,
        "load_max_over_mean_worst": 3.0,
        "dropped_fraction": 0.125,
        "layer0_load_min": 0.0,
        "layer0_load_mean": 2.0,
        "layer0_load_p95": pytest.approx(2 + 0.85 * 4),
        "layer0_load_max": 6.0,
        "layer0_load_max_over_mean": 3.0,
        "layer0_dropped": 0.25,
        "layer0_rank_bytes_mean": 8.0,  # 4 copies of 8 bytes on 4 groups
        "layer0_rank_bytes_max": 16.0,
        "layer10_load_min": 2.0,
        "layer10_load_mean": 2.0,
        "layer10_load_p95": 2.0,
        "layer10_load_max": 2.0,
        "layer10_load_max_over_mean": 1.0,
        "layer10_dropped": 0.0,
        "layer10_rank_bytes_mean": 8.0,
        "layer10_rank_bytes_max": 8.0,
    }
    assert LoadFigures()({}, 2) == {}
    assert LoadFigures()({"load.0": torch.zeros(4)}, 2)["load_max_over_mean"] == 1.0


def test_picture_of_a_run(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    lines = [
        {"step": s, **{f"layer{i}_load_max_over_mean": 1.0 + s + i for i in (0, 3)}}
        for s in (1, 2, 5)
    ]
    lines.insert(1, {"step": 1, "heldout_loss": 2.0})
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_load(metrics, tmp_path / "load.png")
    assert (tmp_path / "load.png").stat().st_size > 1000
    plot_load(metrics, tmp_path / "load.svg")
    drawn = (tmp_path / "load.svg").read_text()
    assert "<!-- layer -->" in drawn and "<!-- 3 -->" in drawn
    metrics.write_text('{"step": 1, "loss": 2.0}\n')
    plot_load(metrics, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    with pytest.raises(DataError, match="cannot read metrics"):
        plot_load(tmp_path / "nothing", tmp_path / "none.png")
