"""The curves of a run, from its metrics file to a picture."""

import math
from collections.abc import Iterable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fivefold.parallel_core.errors import DataError
from fivefold.parallel_core.training.metrics import read_jsonl

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = tuple[list[int], list[float]]
"""Steps, and the values that were measured there."""

_TRAIN, _HELDOUT, _LEFT, _RIGHT = "#4477aa", "#cc3311", "#228833", "#aa3377"
_PAIRS = (  # what one panel below the loss shows: (key, label) on the left axis, and on the right
    (("load_max_over_mean", "load, max / mean"), ("tokens_per_second", "tokens / s")),
    (("learning_rate", "learning rate"), ("grad_norm", "gradient norm")),
)


def plot_losses(metrics_jsonl: str | Path, png: str | Path, *, title: str | None = None) -> None:
    """Draw the loss of a run, and below it what else was measured.

    The loss is in bits a byte where the file has them, otherwise in bits a token. The steps are
    on a logarithmic axis, on which the usual power law of the loss is nearly straight. The faint
    line is what was measured, the strong line its running mean.

    Args:
        metrics_jsonl: file that ``JsonlSink`` wrote; of its keys ``loss``, ``heldout_loss`` (nats
            a token), ``bits_per_byte``, ``heldout_bits_per_byte``, ``load_max_over_mean``,
            ``tokens_per_second``, ``learning_rate`` and ``grad_norm``, those that are there
            are drawn.
        png: picture to write; the ending of the name says the format.
        title: line above the picture.

    Raises:
        DataError: no such file, or no loss in it.
        ImportError: matplotlib is not installed.
    """
    records = read_jsonl(metrics_jsonl)
    unit, train, heldout = _losses(records)
    if not train[0] and not heldout[0]:
        raise DataError(f"{metrics_jsonl}: none of its {len(records)} records has a loss")
    pairs = [tuple((_series(records, key), label) for key, label in pair) for pair in _PAIRS]
    pairs = [pair for pair in pairs if any(steps for (steps, _), _ in pair)]
    figure, axes = _figure([3.0] + [1.4] * len(pairs))
    _draw_losses(axes[0], unit, train, heldout)
    for below, pair in zip(axes[1:], pairs, strict=True):
        _draw_pair(below, pair)
    _draw_steps(axes[-1], [*train[0], *heldout[0]])
    if title:
        axes[0].set_title(title, loc="left", fontweight="bold")
    Path(png).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=150)


def _series(records: Iterable[Mapping[str, Any]], key: str, scale: float = 1.0) -> Series:
    points = [(r["step"], r[key] * scale) for r in records if r.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _losses(records: list[dict[str, Any]]) -> tuple[str, Series, Series]:
    """Unit, and the curves of the training and the held-out loss in it."""
    train, heldout = (_series(records, key) for key in ("bits_per_byte", "heldout_bits_per_byte"))
    if train[0]:
        return "bits per byte", train, heldout
    to_bits = 1 / math.log(2)
    train, nats = (_series(records, key, to_bits) for key in ("loss", "heldout_loss"))
    if not train[0] and heldout[0]:
        return "bits per byte", train, heldout
    return "bits per token", train, nats


def _smooth(values: list[float]) -> list[float]:
    """Mean of the last twentieth of the records so far: equally wide all along a log axis."""
    sums = [0.0, *accumulate(values)]
    first = [i - i // 20 for i in range(len(values))]
    return [(sums[i + 1] - sums[start]) / (i + 1 - start) for i, start in enumerate(first)]


def _figure(heights: list[float]) -> tuple["Figure", list["Axes"]]:
    """A figure of panels above each other, outside of pyplot and its global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'plots need matplotlib: pip install "fivefold-parallel-core[train]"'
        ) from error
    figure = Figure(figsize=(8.0, 1.0 + 1.25 * sum(heights)), layout="constrained")
    options = {"height_ratios": heights}
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw=options)
    for panel in axes[:, 0]:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    return figure, list(axes[:, 0])


def _draw_losses(axes: "Axes", unit: str, train: Series, heldout: Series) -> None:
    if train[0]:
        _draw_curve(axes, train, _TRAIN, f"train {_smooth(train[1])[-1]:.3f}")
    if heldout[0]:
        label = f"held-out {heldout[1][-1]:.3f}"
        axes.plot(*heldout, color=_HELDOUT, marker="o", markersize=3.5, linewidth=1.4, label=label)
    axes.set_ylabel(f"loss, {unit}")
    axes.legend(frameon=False)


def _draw_pair(axes: "Axes", pair: Iterable[tuple[Series, str]]) -> None:
    """Up to two curves, each with its own axis in its own colour."""
    from matplotlib.ticker import FuncFormatter

    drawn = [(series, label) for series, label in pair if series[0]]
    for i, (series, label) in enumerate(drawn):
        panel = axes if i == 0 else axes.twinx()
        color = (_LEFT, _RIGHT)[i]
        _draw_curve(panel, series, color)
        panel.set_ylabel(label, color=color)
        panel.tick_params(axis="y", colors=color)
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        panel.spines["top"].set_visible(False)


def _draw_curve(axes: "Axes", series: Series, color: str, label: str | None = None) -> None:
    marker = "o" if len(series[0]) == 1 else None  # one point makes no line
    axes.plot(*series, color=color, alpha=0.3, linewidth=0.8)
    axes.plot(series[0], _smooth(series[1]), color=color, linewidth=1.6, marker=marker, label=label)


def _draw_steps(axes: "Axes", steps: list[int]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlabel("step")
    if max(steps) < 20 * max(min(steps), 1):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    elif min(steps) < 1:
        axes.set_xscale("symlog", linthresh=1.0)  # a logarithm has no place for step 0
    else:
        axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
