"""What rank 0 tells of a run: metrics to files, progress to the terminal."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fivefold.parallel_core.errors import DataError
from fivefold.parallel_core.training.metrics import JsonlSink, Sink, Sinks, TensorBoardSink
from fivefold.parallel_core.training.plot import plot_losses
from fivefold.parallel_core.training.progress import Progress

METRICS, CURVE, EVENTS = "metrics.jsonl", "loss.png", "tensorboard"


class RunReport:
    """A run's ``metrics.jsonl``, progress and loss curve; called with each measurement.

    Args:
        folder: of the run.
        total: steps in all.
        step: finished steps of the checkpoint the run resumes from.
        config: plain data that describes the run.
        tensorboard: write TensorBoard events too.
    """

    def __init__(
        self,
        folder: Path,
        total: int,
        step: int = 0,
        config: Mapping[str, Any] | None = None,
        tensorboard: bool = False,
    ):
        self.folder = folder
        sinks: list[Sink] = [JsonlSink(folder / METRICS)]
        if tensorboard:
            sinks.append(TensorBoardSink(folder / EVENTS))
        self._sinks = Sinks(sinks)
        self._sinks.init(step, config)
        self._progress = Progress(total, step)
        if step > 0:
            self._progress.message(f"going on after step {step}")

    def __call__(self, step: int, measured: Mapping[str, float]) -> None:
        """Keep and show what was measured after ``step`` finished steps."""
        self._sinks.log(step, measured)
        if "loss" in measured:
            self._progress.update(measured)
        elif "heldout_bits_per_byte" in measured:
            bits = measured["heldout_bits_per_byte"]
            self._progress.message(f"step {step}: {bits:.3f} bits per byte on held-out text")

    def message(self, text: str) -> None:
        """Tell the person at the terminal something."""
        self._progress.message(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.close()
        self._sinks.finish()
        # A run that failed before its first loss has no curve, and its own error is what matters.
        with contextlib.suppress(*([] if error is None else [DataError])):
            self.draw()

    def draw(self) -> None:
        """Draw the curve where matplotlib is installed; a run does not need it."""
        with contextlib.suppress(ImportError):
            plot_losses(self.folder / METRICS, self.folder / CURVE)
