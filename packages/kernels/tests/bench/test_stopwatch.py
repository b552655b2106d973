"""Stopwatches; the GPU's with events that only note their order."""

import time
from types import SimpleNamespace

import pytest
import torch

from fivefold.kernels.bench import stopwatch
from fivefold.kernels.bench.calls import Call, Values
from fivefold.kernels.bench.stopwatch import CPUStopwatch, GPUStopwatch


def test_cpu_time_leaves_out_waiting() -> None:
    reading = CPUStopwatch(1).time(lambda: time.sleep(0.05))
    assert reading["wall"] >= 0.05
    assert reading["cpu"] < 0.02


def test_seconds_are_of_one_call_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    elapsed = [0.0]
    clocks = SimpleNamespace(
        perf_counter=lambda: 3 * elapsed[0], process_time=lambda: 2 * elapsed[0]
    )
    monkeypatch.setattr(stopwatch, "time", clocks)

    def second() -> None:
        elapsed[0] += 1

    assert CPUStopwatch(1).time(second, 5) == {"cpu": 2, "wall": 3}
    assert elapsed == [5]


def test_basis() -> None:
    assert CPUStopwatch(1).basis == "cpu"
    assert CPUStopwatch(2).basis == "wall"


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_small_calls_are_timed_in_blocks() -> None:
    calls = []
    timer = CPUStopwatch(1).timer(Call(lambda: calls.append(1), Values({})))
    calls.clear()
    timer()
    assert len(calls) > 10


def test_large_calls_are_timed_alone() -> None:
    calls = []
    timer = CPUStopwatch(1).timer(Call(lambda: (calls.append(1), spin(0.002)), Values({})))
    calls.clear()
    timer()
    assert len(calls) == 1


def test_each_timed_call_finds_its_inputs_restored() -> None:
    seen = []

    def overwrite(x):
        seen.append(float(x))
        x.add_(1)

    call = Call(overwrite, Values({"x": torch.zeros(())}))
    call.results()
    timer = CPUStopwatch(1).timer(call)
    timer()
    timer()
    assert seen == [0, 0, 0]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens on a GPU that takes 3 ms between any two events."""
    happened: list[str] = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            happened.append("event")

        def elapsed_time(self, end):
            return 3.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("wait"))
    return happened


def test_gpu_call_lies_between_events_after_the_flush(log: list[str]) -> None:
    watch = GPUStopwatch(flush=lambda: log.append("flush"))
    assert watch.time(lambda: log.append("call")) == {"gpu": 0.003}
    assert log == ["flush", "event", "call", "event", "wait"]


def test_gpu_values_are_restored_out_of_the_events(log: list[str]) -> None:
    def overwrite(x):
        log.append(f"call {float(x)}")
        x.add_(1)

    watch = GPUStopwatch(flush=lambda: log.append("flush"))
    call = Call(overwrite, Values({"x": torch.zeros(())}))
    call.results()
    timer = watch.timer(call)
    log.clear()
    assert timer() == {"gpu": 0.003}
    timer()
    assert log == ["flush", "event", "call 0.0", "event", "wait"] * 2


def test_gpu_graph_is_recorded_once_and_replayed(log: list[str], monkeypatch) -> None:
    class Graph:
        def replay(self):
            log.append("replay")

    monkeypatch.setattr(stopwatch, "_recorded", lambda call: log.append("record") or Graph())
    watch = GPUStopwatch(flush=lambda: log.append("flush"))
    timer = watch.graph_timer(Call(lambda: None, Values({})))
    assert timer() == {"graph": 0.003}
    timer()
    once = ["flush", "event", "replay", "event", "wait"]
    assert log == ["record", *once, *once]
