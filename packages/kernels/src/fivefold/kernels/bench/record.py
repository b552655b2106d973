"""What was measured: plain data, the arithmetic on it, and the file that keeps it."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from fivefold.kernels import files

SCHEMA = 1

Status = Literal["timed", "wrong", "error", "not installed"]


@dataclass(kw_only=True, slots=True)
class Result:
    """One contender in one case.

    Attributes:
        name: ours with its backend, eager, compile, or a library's name.
        status: timed; wrong (results differ from ours); error; not installed.
        reason: in one line why it was not timed, or not timed by every clock.
        seconds: times of one call by clock, one a round: "cpu" and "wall", or "gpu" (as called
            from Python) and "graph" (kernels alone).
    """

    name: str
    status: Status
    reason: str = ""
    seconds: dict[str, list[float]] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class Case:
    """One op on one sample, dtype and phase.

    Attributes:
        package: whose op it is.
        op: its name.
        sample: name of the sample.
        dtype: without ``torch.``.
        phase: "forward" or "forward+backward".
        bytes: least bytes read and written.
        flops: least additions and multiplications on tensor cores.
        floor_seconds: the roofline floor, None where nothing was timed.
        basis: the clock to read first.
        results: of the contenders, ours first.
    """

    package: str
    op: str
    sample: str
    dtype: str
    phase: str
    bytes: int = 0
    flops: int = 0
    floor_seconds: float | None = None
    basis: str = ""
    results: list[Result] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Times of one contender by one clock.

    Attributes:
        median: seconds.
        minimum: seconds.
        ratio: its median over that of ours: above 1, ours is faster. None where ours has no times.
        ratio_of_minima: the same of minima.
        percent_of_floor: 100 at the roofline floor, 50 at twice its time.
    """

    median: float
    minimum: float
    ratio: float | None
    ratio_of_minima: float | None
    percent_of_floor: float | None


def summarize(
    seconds: Sequence[float], ours: Sequence[float] | None, floor: float | None
) -> Summary:
    """Median, minimum, ratios and distance from the floor of the times of one contender.

    Args:
        seconds: its times, at least one.
        ours: the times of ours by the same clock.
        floor: seconds.
    """
    median, minimum = statistics.median(seconds), min(seconds)
    return Summary(
        median=median,
        minimum=minimum,
        ratio=_quotient(median, statistics.median(ours)) if ours else None,
        ratio_of_minima=_quotient(minimum, min(ours)) if ours else None,
        percent_of_floor=None if floor is None else _quotient(100 * floor, median),
    )


def summaries(case: Case, result: Result) -> dict[str, Summary]:
    """Summary of a contender by clock."""
    ours = case.results[0].seconds
    return {
        clock: summarize(seconds, ours.get(clock), case.floor_seconds)
        for clock, seconds in result.seconds.items()
    }


def as_json(case: Case) -> dict[str, Any]:
    """A case with the summaries beside all times."""
    record = asdict(case)
    for result, entry in zip(case.results, record["results"], strict=True):
        entry["summary"] = {clock: asdict(s) for clock, s in summaries(case, result).items()}
    return record


def write(path: Path, record: dict[str, Any]) -> None:
    """Replace a JSON file by a new one, at once."""
    files.replace(path, json.dumps(record, indent=1) + "\n")


def _quotient(numerator: float, denominator: float) -> float | None:
    """None where a clock was too coarse to see the denominator."""
    return numerator / denominator if denominator > 0 else None
