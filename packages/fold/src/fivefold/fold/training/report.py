"""What rank 0 tells of a run: metrics to files, progress to the terminal, curves to a picture."""

import contextlib
from collections.abc import Mapping
from pathlib import Path

from fivefold.parallel_core.errors import DataError
from fivefold.parallel_core.training.metrics import read_jsonl
from fivefold.parallel_core.training.report import METRICS, RunReport

CURVE = "curve.png"


class FoldReport(RunReport):
    """A run's ``metrics.jsonl``, progress and curves; called with each measurement."""

    def __call__(self, step: int, measured: Mapping[str, float]) -> None:
        """Keep and show what was measured after ``step`` finished steps."""
        super().__call__(step, measured)
        if "heldout_lddt_ca" in measured:
            self.message(f"step {step}: lDDT-CA {measured['heldout_lddt_ca']:.3f}")

    def draw(self) -> None:
        """See ``RunReport.draw``."""
        # A run that ended before its first step has nothing to show.
        with contextlib.suppress(ImportError, DataError):
            plot_run(self.folder / METRICS, self.folder / CURVE)


_PANELS = (
    ("lDDT-CA", (("lddt_ca", "training crops"), ("heldout_lddt_ca", "whole chains"))),
    ("loss", (("loss", "sum"), ("backbone", "backbone FAPE"), ("side_chain", "side-chain FAPE"),
              ("distogram", "distogram"), ("masked_msa", "masked MSA"))),
)  # fmt: skip


def plot_run(metrics: str | Path, picture: str | Path, title: str | None = None) -> None:
    """Draw lDDT-CA and the losses of a run over its steps; losses as running means.

    Args:
        metrics: a run's ``metrics.jsonl``.
        picture: to write.
        title: above it.

    Raises:
        DataError: no such file, or nothing in it to draw.
        ImportError: matplotlib is not installed.
    """
    records = read_jsonl(metrics)
    if not any("loss" in record for record in records):
        raise DataError(f"{metrics}: none of its {len(records)} records has a loss")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "fivefold-fold[plot]"') from error
    figure = Figure(figsize=(8, 6), layout="constrained")
    for axes, (label, curves) in zip(figure.subplots(2, 1, sharex=True), _PANELS, strict=True):
        for key, name in curves:
            points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            dense = len(points) > 50
            axes.plot(steps, _smooth(values) if dense else values, label=name,
                      marker=None if dense else ".", linewidth=1.4)  # fmt: skip
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    axes.set_xlabel("step")
    if title:
        figure.suptitle(title)
    Path(picture).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


def _smooth(values: tuple[float, ...]) -> list[float]:
    """Mean of the last twenty values."""
    return [sum(values[max(0, i - 19) : i + 1]) / min(i + 1, 20) for i in range(len(values))]
