"""Pictures of metrics files, looked into through matplotlib's own objects."""

import builtins
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from fivefold.parallel_core.errors import DataError
from fivefold.parallel_core.training.metrics import JsonlSink
from fivefold.parallel_core.training.plot import plot_losses


def write(path: Path, records: list[dict[str, Any]], first: int = 1) -> Path:
    sink = JsonlSink(path)
    sink.init()
    for step, record in enumerate(records, first):
        sink.log(step, record)
    sink.finish()
    return path


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    figures: list[Figure] = []
    real = Figure.savefig

    def savefig(self: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        real(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def labels(figure: Figure) -> list[str]:
    return [axes.get_ylabel() for axes in figure.axes]


def full(step: int) -> dict[str, float]:
    return {
        "loss": 4 / step,
        "heldout_loss": 5 / step,
        "bits_per_byte": 2 / step,
        "heldout_bits_per_byte": 2.5 / step,
        "load_max_over_mean": 1.5,
        "tokens_per_second": 1e5,
        "learning_rate": 1e-3,
        "grad_norm": 2.0,
    }


def test_a_full_run(tmp_path: Path, drawn: list[Figure]) -> None:
    path = write(tmp_path / "m.jsonl", [full(step) for step in range(1, 61)])
    plot_losses(path, tmp_path / "new" / "loss.png", title="a run")
    pixels = imread(tmp_path / "new" / "loss.png")
    assert pixels.shape[0] > 800
    assert pixels.shape[1] == 1200
    assert (pixels[..., :3].min(-1) < 0.5).mean() > 0.005  # there is ink
    (figure,) = drawn
    assert labels(figure) == [
        "loss, bits per byte",
        "load, max / mean",
        "learning rate",
        "tokens / s",
        "gradient norm",
    ]
    top = figure.axes[0]
    assert top.get_title(loc="left") == "a run"
    assert top.get_xscale() == "log"
    raw, smooth, heldout = top.get_lines()
    assert list(raw.get_xdata()) == list(range(1, 61))
    assert list(raw.get_ydata()) == [2 / step for step in range(1, 61)]
    assert list(heldout.get_ydata()) == [2.5 / step for step in range(1, 61)]
    assert smooth.get_ydata()[5] == pytest.approx(2 / 6)
    assert smooth.get_ydata()[59] == pytest.approx((2 / 58 + 2 / 59 + 2 / 60) / 3)
    legend = top.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["train 0.034", "held-out 0.042"]


def test_nats_become_bits_a_token(tmp_path: Path, drawn: list[Figure]) -> None:
    path = write(tmp_path / "m.jsonl", [{"loss": math.log(8)}, {"heldout_loss": math.log(4)}])
    plot_losses(path, tmp_path / "loss.png")
    assert labels(drawn[0]) == ["loss, bits per token"]
    raw, _, heldout = drawn[0].axes[0].get_lines()
    assert raw.get_ydata() == pytest.approx([3.0])
    assert (list(heldout.get_xdata()), heldout.get_ydata()) == ([2], pytest.approx([2.0]))
    assert drawn[0].axes[0].get_xscale() == "linear"


def test_gaps_are_left_out(tmp_path: Path, drawn: list[Figure]) -> None:
    """A loss that was not finite is null in the file."""
    path = write(tmp_path / "m.jsonl", [{"loss": 1.0}, {"loss": math.nan}, {"loss": 2.0}])
    plot_losses(path, tmp_path / "loss.png")
    assert list(drawn[0].axes[0].get_lines()[0].get_xdata()) == [1, 3]


def test_step_zero_and_one_curve_a_panel(tmp_path: Path, drawn: list[Figure]) -> None:
    records = [{"loss": 1.0, "tokens_per_second": 9.0}] * 40
    plot_losses(write(tmp_path / "m.jsonl", records, first=0), tmp_path / "loss.png")
    assert labels(drawn[0]) == ["loss, bits per token", "tokens / s"]
    assert drawn[0].axes[0].get_xscale() == "symlog"


def test_only_a_heldout_loss(tmp_path: Path, drawn: list[Figure]) -> None:
    path = write(tmp_path / "m.jsonl", [{"heldout_bits_per_byte": 1.0}] * 2)
    plot_losses(path, tmp_path / "loss.png")
    assert labels(drawn[0]) == ["loss, bits per byte"]


def test_files_without_a_loss(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", [{"grad_norm": 1.0}] * 3)
    with pytest.raises(DataError, match=r"m\.jsonl: none of its 3 records has a loss"):
        plot_losses(path, tmp_path / "loss.png")
    with pytest.raises(DataError, match=r"cannot read metrics"):
        plot_losses(tmp_path / "none.jsonl", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    path = write(tmp_path / "m.jsonl", [{"loss": 1.0}])
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "fivefold-parallel-core\[train\]"'):
        plot_losses(path, tmp_path / "loss.png")
