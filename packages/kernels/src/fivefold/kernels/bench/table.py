"""What the command prints."""

from typing import Any

from fivefold.kernels.bench.record import Case, Result, Summary, summaries

_CLOCKS = {
    "cpu": "CPU time",
    "wall": "wall time",
    "gpu": "GPU, as called",
    "graph": "GPU, CUDA graph",
}
_NAME_WIDTH = 24


def heading(machine: dict[str, Any], versions: dict[str, str], gpu_at_hand: bool) -> list[str]:
    """Which device ran, and how the figures are to be read."""
    threads = f"{machine['threads']} thread" + "s" * (machine["threads"] > 1)
    device = f"{machine['device']}: {machine['device_name']}"
    if machine["device"] == "cpu":
        device += f", {machine['cores']} cores, {threads}"
    lines = [device, "  ".join(f"{name} {number}" for name, number in versions.items())]
    if machine["device"] == "cpu":
        lines.append(
            "These are figures of a CPU and say nothing of a GPU"
            + (": there is none at hand." if not gpu_at_hand else ".")
        )
    lines.append(
        "ratio: the median over the median of ours; above 1, ours is faster. "
        "floor: the time at the roofline as a share of the median."
    )
    return lines


def section(case: Case) -> list[str]:
    """One case: a line a contender."""
    title = f"{case.package}/{case.op}  {case.sample}  {case.dtype}  {case.phase}"
    if case.floor_seconds is not None:
        title += f"  floor {_time(case.floor_seconds)}"
    clocks = list(dict.fromkeys(clock for result in case.results for clock in result.seconds))
    head = " " * _NAME_WIDTH + "".join(
        f"{_CLOCKS[clock]:>16}{'minimum':>11}{'ratio':>7}{'floor':>8}" for clock in clocks
    )
    return ["", title, *([head] if clocks else []), *(_row(case, r, clocks) for r in case.results)]


def complaints(cases: list[Case]) -> list[str]:
    """Contenders that were not timed although they are there, once more at the end."""
    return [
        f"not timed: {case.package}/{case.op} {case.sample} {case.dtype} {case.phase}: "
        f"{result.name}, {_status(result)}"
        for case in cases
        for result in case.results
        if result.status in ("wrong", "error")
    ]


def rates(copy_rate: float | None, matmul_rates: dict[str, float]) -> str:
    """What the floors stand on."""
    parts = [] if copy_rate is None else [f"copy {copy_rate / 1e9:.1f} GB/s"]
    parts += [f"matmul {rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in matmul_rates.items()]
    return "Measured for the floors: " + (", ".join(parts) or "nothing")


def _row(case: Case, result: Result, clocks: list[str]) -> str:
    name = f"  {result.name:<{_NAME_WIDTH - 2}}"
    if result.status != "timed":
        return name + _status(result)
    found = summaries(case, result)
    columns = (_columns(found.get(clock)) for clock in clocks)
    return name + "".join(columns) + (f"  ({result.reason})" if result.reason else "")


def _status(result: Result) -> str:
    status = "WRONG" if result.status == "wrong" else result.status
    return status + (f": {result.reason}" if result.reason else "")


def _columns(summary: Summary | None) -> str:
    if summary is None:
        return f"{'-':>16}{'-':>11}{'-':>7}{'-':>8}"
    ratio = "-" if summary.ratio is None else f"{summary.ratio:.2f}"
    share = "-" if summary.percent_of_floor is None else f"{summary.percent_of_floor:.0f}%"
    return f"{_time(summary.median):>16}{_time(summary.minimum):>11}{ratio:>7}{share:>8}"


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
