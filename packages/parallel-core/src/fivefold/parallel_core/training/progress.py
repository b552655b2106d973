"""How far a run is: a bar on a terminal, a line now and then in a log file."""

import importlib
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self, TextIO

_LABELS = {
    "loss": "loss",
    "bits_per_byte": "bits/byte",
    "heldout_loss": "held-out",
    "lddt_ca": "lDDT-CA",
    "heldout_lddt_ca": "held-out lDDT-CA",
    "tokens_per_second": "tokens/s",
    "load_max_over_mean": "balance",
    "dropped_fraction": "dropped",
}


class Progress:
    """Shows finished steps, with the last losses, tokens a second and load balance.

    On a terminal it is a tqdm bar. Into a file or pipe, or without tqdm, it is a plain line each
    ``interval`` seconds, without carriage returns.

    Args:
        total: steps in all.
        initial: steps that were finished before, by the run that this one resumes.
        enabled: False shows nothing; callers give True on rank 0 only.
        interval: least seconds between two plain lines; the first and the last always appear.
        stream: where to; None is stderr.
        clock: seconds, for tests.

    >>> with Progress(2, interval=0, stream=sys.stdout, clock=lambda: 0.0) as progress:
    ...     progress.update({"loss": 2.5})
    ...     progress.update({"loss": 2.25})
    step 1/2 (50.0%), loss 2.5
    step 2/2 (100.0%), loss 2.25
    """

    def __init__(
        self,
        total: int,
        initial: int = 0,
        enabled: bool = True,
        *,
        interval: float = 30.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total, self.step = total, initial
        self._initial, self._enabled, self._interval = initial, enabled, interval
        self._stream = stream or sys.stderr
        self._clock, self._start = clock, clock()
        self._shown: dict[str, str] = {}
        self._last: tuple[int, float] | None = None  # step and time of the last plain line
        self._bar = self._make_bar() if enabled and self._stream.isatty() else None

    def update(self, measured: Mapping[str, Any] | None = None, steps: int = 1) -> None:
        """Count ``steps`` more finished steps and show those values of the record it knows."""
        self.step += steps
        for key, label in _LABELS.items():
            value = (measured or {}).get(key)
            if value is not None:
                self._shown[label] = f"{float(value):.4g}" if abs(value) < 1000 else f"{value:,.0f}"
        if self._bar is not None:
            self._bar.set_postfix(self._shown, refresh=False)
            self._bar.update(steps)
        elif self._enabled and self._due():
            self._write_line()

    def message(self, text: str) -> None:
        """Print a line of text, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif self._enabled:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Show the last state."""
        if self._bar is not None:
            self._bar.close()
        elif self._enabled and self._last is not None and self._last[0] != self.step:
            self._write_line()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _make_bar(self) -> Any:
        try:
            tqdm = importlib.import_module("tqdm").tqdm
        except ImportError:
            return None  # plain lines say the same
        return tqdm(
            total=self.total,
            initial=self.step,
            file=self._stream,
            unit="step",
            dynamic_ncols=True,
            smoothing=0.1,
        )

    def _due(self) -> bool:
        return self._last is None or self._clock() - self._last[1] >= self._interval

    def _write_line(self) -> None:
        now = self._clock()
        self._last = (self.step, now)
        parts = [f"step {self.step}/{self.total} ({100 * self.step / max(self.total, 1):.1f}%)"]
        parts += [f"{label} {value}" for label, value in self._shown.items()]
        done, seconds = self.step - self._initial, now - self._start
        if done > 0 and self.step < self.total and seconds > 0:
            left = seconds / done * (self.total - self.step)
            parts.append(f"{done / seconds:.3g} steps/s, {_duration(left)} left")
        print(", ".join(parts), file=self._stream, flush=True)


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
