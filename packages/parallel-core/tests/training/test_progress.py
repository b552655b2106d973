"""Progress as plain lines and as a bar."""

import importlib
import io
import re
import sys
from typing import Any

import pytest

from fivefold.parallel_core.training.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


RECORD = {
    "loss": 2.34567,
    "tokens_per_second": 51234.5,
    "load_max_over_mean": 1.25,
    "grad_norm": 3.0,
}


def test_lines_come_first_each_interval_and_last() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress(100, interval=30, stream=stream, clock=clock) as progress:
        for _ in range(100):
            clock.now += 1
            progress.update({"loss": 1.0})
    found = [int(step) for step in re.findall(r"^step (\d+)/100 ", stream.getvalue(), re.M)]
    assert found == [1, 31, 61, 91, 100]
    assert "\r" not in stream.getvalue()
    assert stream.getvalue().count("\n") == 5


def test_a_line_has_the_known_values_the_rate_and_what_is_left() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = Progress(5000, initial=1000, interval=10, stream=stream, clock=clock)
    clock.now += 2
    progress.update(RECORD)
    clock.now += 998
    progress.update({"heldout_loss": 2.5}, steps=0)
    clock.now += 0
    progress.update(RECORD, steps=499)
    progress.close()
    first, second, third = stream.getvalue().splitlines()
    assert first == (
        "step 1001/5000 (20.0%), loss 2.346, tokens/s 51,234, balance 1.25, "
        "0.5 steps/s, 2:13:18 left"
    )
    assert "held-out 2.5" in second
    assert second.startswith("step 1001/5000")
    assert third.startswith("step 1500/5000 (30.0%), loss 2.346")
    assert third.endswith("0.5 steps/s, 1:56:40 left")


def test_closing_twice_or_without_steps_writes_nothing_more() -> None:
    stream = io.StringIO()
    progress = Progress(3, stream=stream)
    progress.close()
    assert stream.getvalue() == ""
    progress.update({"loss": None})
    progress.close()
    progress.close()
    assert stream.getvalue().count("\n") == 1
    assert "loss" not in stream.getvalue()


def test_messages_are_lines() -> None:
    stream = io.StringIO()
    progress = Progress(3, stream=stream)
    progress.message("saved step 1")
    assert stream.getvalue() == "saved step 1\n"


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_other_ranks_show_nothing_but_count(stream: Any) -> None:
    with Progress(3, enabled=False, interval=0, stream=stream) as progress:
        progress.update(RECORD)
        progress.message("hello")
    assert stream.getvalue() == ""
    assert progress.step == 1


def test_stderr_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(2) as progress:
        progress.update()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("step 1/2 (50.0%)")


def test_a_terminal_gets_a_bar() -> None:
    stream = Terminal()
    with Progress(10, initial=4, stream=stream) as progress:
        progress.update(RECORD)
        progress.message("saved step 5")
        progress.update(RECORD, steps=5)
    text = stream.getvalue()
    assert "\r" in text
    assert "saved step 5\n" in text
    last = text.rstrip().split("\r")[-1]
    assert "10/10" in last
    assert "loss=2.346" in last
    assert "tokens/s=51,234" in last
    assert "balance=1.25" in last


def test_a_terminal_without_tqdm_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str, package: str | None = None) -> Any:
        if name == "tqdm":
            raise ModuleNotFoundError(name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", without)
    stream = Terminal()
    with Progress(10, stream=stream) as progress:
        progress.update(RECORD)
    assert stream.getvalue().startswith("step 1/10 (10.0%), loss 2.346")
    assert "\r" not in stream.getvalue()


def test_importing_it_imports_no_tqdm() -> None:
    import subprocess

    code = "import sys, fivefold.parallel_core.training.progress as p; print('tqdm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
