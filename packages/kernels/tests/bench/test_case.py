"""Cases: contenders are checked first, and only those that agree are timed."""

import gc
import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fivefold.kernels.bench.case import BOTH, FORWARD, Contest, Limits, one_line
from fivefold.kernels.bench.record import Case, Result
from fivefold.kernels.bench.stopwatch import CPUStopwatch, GPUStopwatch
from fivefold.kernels.ops.rms_norm.samples import SAMPLES
from fivefold.kernels.samples import Maker, OpSamples, Peer

from .parts import double, inputs, samples

LIMITS = Limits(repeats=2, seconds=1.0, compiled=False, every_backend=False)


def run(op: OpSamples, phase: str = FORWARD, watch=None, **limits) -> Case:
    case = Case(package="kernels", op=op.name, sample="4x3", dtype="float32", phase=phase)
    contest = Contest(op, inputs(), torch.float32, phase, "cpu", replace(LIMITS, **limits))
    assert contest.run(case, watch or CPUStopwatch(1))
    return case


def result(case: Case, name: str) -> Result:
    return next(each for each in case.results if each.name == name)


def counted(function: Callable) -> tuple[Callable, list]:
    calls: list = []

    def counting(x, backend=None):
        calls.append(1)
        return function(x)

    return counting, calls


@pytest.mark.parametrize("phase", [FORWARD, BOTH])
def test_those_that_agree_are_timed(phase: str) -> None:
    case = run(samples(), phase)
    assert [each.name for each in case.results] == ["ours (no op)", "eager"]
    for each in case.results:
        assert each.status == "timed"
        assert {clock: len(times) for clock, times in each.seconds.items()} == {"cpu": 2, "wall": 2}
    assert case.basis == "cpu"


def test_wrong_results_are_not_timed() -> None:
    function, calls = counted(lambda x: x * 2.1)
    case = run(samples(eager=function))
    assert result(case, "eager").status == "wrong"
    assert "result 0 differs from ours in 12 of 12 values" in result(case, "eager").reason
    assert result(case, "eager").seconds == {}
    assert len(calls) == 1
    assert result(case, "ours (no op)").seconds


def test_wrong_gradients_are_not_timed() -> None:
    function, calls = counted(lambda x: x.detach() + x)
    assert result(run(samples(eager=function), FORWARD), "eager").status == "timed"
    calls.clear()
    found = result(run(samples(eager=function), BOTH), "eager")
    assert (found.status, len(calls)) == ("wrong", 1)
    assert found.reason.startswith("gradient of x differs")


def test_forward_builds_no_graph() -> None:
    seen = []
    function, _ = counted(lambda x: seen.append(torch.is_grad_enabled()) or x * 2)
    run(samples(eager=function), FORWARD)
    assert set(seen) == {False}


def test_op_without_gradients_has_no_backward_case() -> None:
    op = samples(function=lambda x, backend=None: x.detach() * 2)
    case = Case(package="kernels", op="double", sample="4x3", dtype="float32", phase=BOTH)
    contest = Contest(op, inputs(), torch.float32, BOTH, "cpu", LIMITS)
    assert not contest.run(case, CPUStopwatch(1))


def test_peers_that_are_missing_break_or_do_not_take_it() -> None:
    def absent(x):
        from nothing_of_this_name import double

        return double(x)

    def hidden(x):
        return absent(x)

    def broken(x):
        raise RuntimeError("0 active drivers\n  and more")

    def refusing(_):
        raise ValueError("cannot say")

    case = run(
        samples(
            Peer(name="absent", function=absent),
            Peer(name="hidden", function=hidden),
            Peer(name="broken", function=broken),
            Peer(name="refusing", function=double, takes=refusing),
            Peer(name="elsewhere", function=double, takes=lambda _: False),
            Peer(name="good", function=double),
        )
    )
    found = {each.name: (each.status, each.reason) for each in case.results[2:]}
    assert found == {
        "absent": ("not installed", "nothing_of_this_name"),
        "hidden": (
            "not installed",
            "ModuleNotFoundError: No module named 'nothing_of_this_name'",
        ),
        "broken": ("error", "RuntimeError: 0 active drivers and more"),
        "refusing": ("error", "ValueError: cannot say"),
        "good": ("timed", ""),
    }


def test_one_that_breaks_while_it_is_timed() -> None:
    calls = []

    def breaks(x):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("again")
        return x * 2

    case = run(samples(eager=breaks))
    assert (result(case, "eager").status, result(case, "eager").reason) == (
        *("error", "RuntimeError: again"),
    )
    assert len(result(case, "ours (no op)").seconds["cpu"]) == 2


def test_ours_breaks() -> None:
    def breaks(x, backend=None):
        raise RuntimeError("broke")

    (only,) = run(samples(function=breaks)).results
    assert (only.name, only.status, only.reason) == ("ours", "error", "RuntimeError: broke")


def test_in_place_op_finds_fresh_values_and_is_compared_by_what_it_wrote() -> None:
    seen = []

    @torch.no_grad()
    def ours(x, backend=None):
        seen.append(float(x[0, 0]))
        x.mul_(2)

    @torch.no_grad()
    def good(x):
        seen.append(float(x[0, 0]))
        x.add_(x.clone())

    @torch.no_grad()
    def bad(x):
        x.mul_(3)

    op = samples(Peer(name="bad", function=bad), function=ours, eager=good)
    case = run(op)
    assert [each.status for each in case.results] == ["timed", "timed", "wrong"]
    assert len(seen) >= 6
    assert len(set(seen)) == 1


def test_every_backend() -> None:
    given = SAMPLES.small[0].inputs(Maker(dtype=torch.float32))
    case = Case(package="kernels", op="rms_norm", sample="", dtype="float32", phase=BOTH)
    contest = Contest(
        SAMPLES, given, torch.float32, BOTH, "cpu", replace(LIMITS, every_backend=True)
    )
    contest.run(case, CPUStopwatch(1))
    names = [each.name for each in case.results]
    assert names[0].startswith("ours (")
    assert "ours (reference)" in names
    assert "ours (triton)" not in names
    assert {each.status for each in case.results if "ours" in each.name} == {"timed"}


def test_compiled_takes_part_and_its_error_is_one_line(monkeypatch) -> None:
    def refuse(function, **options):
        raise RuntimeError("no compiler\nin two lines " + "x" * 1000)

    monkeypatch.setattr(torch, "compile", refuse)
    found = result(run(samples(), compiled=True), "compile")
    assert found.status == "error"
    assert found.reason.startswith("RuntimeError: no compiler in two lines xxx")
    assert len(found.reason) < 200


class FakeGPU(GPUStopwatch):
    """A GPU on which every call takes the same time, and eager cannot be recorded."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def time(self, call):
        call()
        return {"gpu": self.seconds}

    def graph_timer(self, call):
        if call._function is double:
            raise RuntimeError("it waits")
        return lambda: {"graph": self.seconds / 2}


@pytest.mark.parametrize(("seconds", "graphs"), [(1e-4, True), (1e-3, False)])
def test_graphs_of_launch_bound_calls(seconds: float, graphs: bool) -> None:
    case = run(samples(function=lambda x, backend=None: x * 2), watch=FakeGPU(seconds))
    ours, eager = case.results
    assert ours.seconds.get("graph") == ([seconds / 2] * 2 if graphs else None)
    assert eager.seconds == {"gpu": [seconds] * 2}
    assert eager.status == "timed"
    assert eager.reason == ("no CUDA graph: RuntimeError: it waits" if graphs else "")


def test_one_that_breaks_on_a_gpu_is_not_recorded_as_a_graph() -> None:
    calls = []

    def breaks(x):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("once")
        return x * 2

    found = result(run(samples(eager=breaks), watch=FakeGPU(1e-4)), "eager")
    assert (found.status, found.seconds) == ("error", {})


def test_one_line() -> None:
    assert one_line(ValueError()) == "ValueError"
    assert one_line(ValueError("a\n  b")) == "ValueError: a b"


def test_what_libraries_log_does_not_break_up_the_table(caplog) -> None:
    def talks(x):
        logging.getLogger("library").error("at length")
        raise RuntimeError("at length")

    assert result(run(samples(eager=talks)), "eager").status == "error"
    assert not caplog.records
    logging.getLogger("library").error("afterwards")
    assert len(caplog.records) == 1


def test_no_garbage_collection_while_timing() -> None:
    seen = []
    function, _ = counted(lambda x: seen.append(gc.isenabled()) or x * 2)
    run(samples(eager=function))
    assert seen[0]
    assert not seen[-1]
    assert gc.isenabled()
