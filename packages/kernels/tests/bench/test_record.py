"""Ratios, shares and the file."""

from fivefold.kernels.bench import record
from fivefold.kernels.bench.record import Case, Result, summarize


def test_ratio_is_above_1_where_ours_is_faster() -> None:
    found = summarize([4.0, 8.0, 6.0], ours=[2.0, 5.0, 3.0], floor=1.5)
    assert (found.median, found.minimum) == (6.0, 4.0)
    assert found.ratio == 2.0
    assert found.ratio_of_minima == 2.0
    assert found.percent_of_floor == 25.0


def test_nothing_to_compare_with() -> None:
    found = summarize([4.0], ours=None, floor=None)
    assert (found.ratio, found.ratio_of_minima, found.percent_of_floor) == (None, None, None)


def test_clock_too_coarse_for_ours() -> None:
    found = summarize([0.0], ours=[0.0], floor=1.0)
    assert (found.ratio, found.percent_of_floor) == (None, None)


def a_case() -> Case:
    return Case(
        package="kernels",
        op="double",
        sample="4x3",
        dtype="float32",
        phase="forward",
        floor_seconds=1.0,
        basis="cpu",
        results=[
            Result(name="ours (x)", status="timed", seconds={"cpu": [2.0], "wall": [2.0]}),
            Result(name="eager", status="timed", seconds={"cpu": [3.0], "wall": [5.0]}),
            Result(name="liger", status="not installed", reason="liger_kernel"),
        ],
    )


def test_summaries_compare_by_the_same_clock() -> None:
    content = record.as_json(a_case())
    eager = content["results"][1]["summary"]
    assert (eager["cpu"]["ratio"], eager["wall"]["ratio"]) == (1.5, 2.5)
    assert content["results"][2]["summary"] == {}
    assert content["results"][1]["seconds"] == {"cpu": [3.0], "wall": [5.0]}
