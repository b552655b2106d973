"""Lines of the table."""

import pytest

from fivefold.kernels.bench import table
from fivefold.kernels.bench.record import Case, Result

MACHINE = {"device": "cpu", "device_name": "A CPU", "cores": 4, "threads": 1}


@pytest.mark.parametrize(
    ("gpu", "line"),
    [
        (False, "These are figures of a CPU and say nothing of a GPU: there is none at hand."),
        (True, "These are figures of a CPU and say nothing of a GPU."),
    ],
)
def test_heading_says_that_a_cpu_is_no_gpu(gpu: bool, line: str) -> None:
    lines = table.heading(MACHINE, {"torch": "3"}, gpu)
    assert lines[:3] == ["cpu: A CPU, 4 cores, 1 thread", "torch 3", line]


def test_heading_of_a_gpu() -> None:
    lines = table.heading({"device": "cuda", "device_name": "X", "threads": 1}, {}, True)
    assert lines[0] == "cuda: X"
    assert not any("CPU" in line for line in lines)


def a_case() -> Case:
    return Case(
        package="kernels",
        op="double",
        sample="4x3",
        dtype="float32",
        phase="forward",
        floor_seconds=0.001,
        basis="cpu",
        results=[
            Result(name="ours (x)", status="timed", seconds={"gpu": [0.004], "graph": [0.002]}),
            Result(name="eager", status="timed", reason="no graph", seconds={"gpu": [0.006]}),
            Result(name="liger", status="not installed", reason="liger_kernel"),
            Result(name="quack", status="wrong", reason="result 0 differs"),
            Result(name="other", status="error", reason="RuntimeError: x"),
        ],
    )


def test_section() -> None:
    _, title, head, ours, eager, liger, quack, other = table.section(a_case())
    assert title == "kernels/double  4x3  float32  forward  floor 1 ms"
    assert "GPU, as called" in head
    assert "GPU, CUDA graph" in head
    assert " ".join(ours.split()) == "ours (x) 4 ms 4 ms 1.00 25% 2 ms 2 ms 1.00 50%"
    assert " ".join(eager.split()) == "eager 6 ms 6 ms 1.50 17% - - - - (no graph)"
    assert " ".join(liger.split()) == "liger not installed: liger_kernel"
    assert " ".join(quack.split()) == "quack WRONG: result 0 differs"
    assert " ".join(other.split()) == "other error: RuntimeError: x"
    assert len(head) == len(ours)


def test_complaints_leave_out_what_is_only_missing() -> None:
    assert table.complaints([a_case()]) == [
        "not timed: kernels/double 4x3 float32 forward: quack, WRONG: result 0 differs",
        "not timed: kernels/double 4x3 float32 forward: other, error: RuntimeError: x",
    ]


def test_rates() -> None:
    assert table.rates(None, {}) == "Measured for the floors: nothing"
    assert table.rates(2e9, {"float32": 3e12}) == (
        "Measured for the floors: copy 2.0 GB/s, matmul 3000 GFLOP/s in float32"
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.0, "2 s"), (0.0123, "12.3 ms"), (4.5e-5, "45 us"), (3e-8, "30 ns")]
)
def test_units(seconds: float, text: str) -> None:
    assert table._time(seconds) == text
