"""What an examination found, as plain data and as lines of text."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from fivefold.parallel_core.doctor.rounds import Verdict
from fivefold.parallel_core.layout import Layout

NOT_RUN = "not run"
_WORST_FIRST = ("silent", "hung", "error", "lost", "wrong")
_SHOWN_GROUPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One collective in one dtype on all groups of an axis.

    Attributes:
        collective: its name.
        dtype: such as "float32", None for a barrier.
        verdicts: of all ranks, None for one that gave none; empty if it was not run.
    """

    collective: str
    dtype: str | None
    verdicts: tuple[Verdict | None, ...] = ()

    @property
    def failures(self) -> dict[int, tuple[str, str]]:
        """(status, detail) of every rank on which it did not go well."""
        found = {}
        for rank, verdict in enumerate(self.verdicts):
            if verdict is None:
                found[rank] = ("silent", "")
            elif verdict.status != "ok":
                found[rank] = (verdict.status, verdict.detail)
        return found

    @property
    def status(self) -> str:
        """The worst of the ranks': ok, wrong, error, hung, silent; or not run."""
        if not self.verdicts:
            return NOT_RUN
        statuses = {status for status, _ in self.failures.values()}
        return next((status for status in _WORST_FIRST if status in statuses), "ok")

    @property
    def minimum(self) -> float:
        """Seconds of the fastest call, on the rank where that is slowest."""
        return max(min(v.seconds) for v in self.verdicts if v is not None)

    @property
    def median(self) -> float:
        """Seconds of the median call, on the rank where that is slowest."""
        return max(median(v.seconds) for v in self.verdicts if v is not None)

    @property
    def sent(self) -> float:
        """Bytes that a rank sends in one call; the most of any rank."""
        return max(v.sent for v in self.verdicts if v is not None)

    @property
    def speed(self) -> float | None:
        """Bytes per second in the median call; None where there are no bytes."""
        return self.sent / self.median if self.sent and self.median else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        data: dict[str, Any] = {
            "collective": self.collective,
            "dtype": self.dtype,
            "status": self.status,
        }
        if self.status == "ok":
            data |= {
                "seconds_min": self.minimum,
                "seconds_median": self.median,
                "bytes_sent": self.sent,
                "bytes_per_second": self.speed,
            }
        elif self.verdicts:
            data["failures"] = [
                {"rank": rank, "status": status, "detail": detail}
                for rank, (status, detail) in self.failures.items()
            ]
        return data


@dataclass(slots=True)
class Examined:
    """All checks of the axes that share their groups.

    Attributes:
        axes: names of these axes.
        groups: the ranks of each group.
        checks: in the order in which they were run.
    """

    axes: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    checks: list[Check] = field(default_factory=list)

    @property
    def name(self) -> str:
        """All axes in one word."""
        return "=".join(self.axes)

    def heading(self) -> str:
        """A line that names the axes and their groups."""
        shown = " ".join(f"[{' '.join(map(str, g))}]" for g in self.groups[:_SHOWN_GROUPS])
        more = f" ..({len(self.groups)})" if len(self.groups) > _SHOWN_GROUPS else ""
        return f"{self.name}: groups of {len(self.groups[0])}, {shown}{more}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "axes": list(self.axes),
            "size": len(self.groups[0]),
            "groups": [list(group) for group in self.groups],
            "checks": [check.to_dict() for check in self.checks],
        }


@dataclass(slots=True)
class Report:
    """What an examination found; complete on rank 0.

    Attributes:
        layout: what was examined.
        settings: of the examination.
        axes: of all axes, those of one rank included, which have no checks.
    """

    layout: Layout
    settings: dict[str, Any]
    axes: list[Examined] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """Number of checks by status."""
        statuses = [check.status for examined in self.axes for check in examined.checks]
        return {status: statuses.count(status) for status in sorted(set(statuses))}

    @property
    def is_ok(self) -> bool:
        """Whether every check was run and went well."""
        return set(self.counts) <= {"ok"}

    @property
    def silent(self) -> list[int]:
        """Ranks that gave no answer."""
        checks = [check for examined in self.axes for check in examined.checks]
        return sorted({r for c in checks for r, v in enumerate(c.verdicts) if v is None})

    def summary(self) -> str:
        """One line: how many checks went well, or which did not and on which ranks."""
        total = sum(self.counts.values())
        if self.is_ok:
            return f"all {total} checks ok" if total else "one rank sends nothing: nothing to check"
        failed = [
            f"{name} over {examined.name} ({_blame(checks)})"
            for examined in self.axes
            for name, checks in by_collective(examined.checks).items()
            if any(check.failures for check in checks)
        ]
        idle = self.counts.get(NOT_RUN, 0)
        bad = total - idle - self.counts.get("ok", 0)
        rest = f", {idle} were not run" if idle else ""
        return f"{bad} of {total} checks failed{rest}: {', '.join(failed)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "layout": self.layout.to_dict(),
            **self.settings,
            "ok": self.is_ok,
            "counts": self.counts,
            "axes": [examined.to_dict() for examined in self.axes],
        }


def by_collective(checks: Iterable[Check]) -> dict[str, list[Check]]:
    """The checks of each collective, one for each dtype."""
    found: dict[str, list[Check]] = {}
    for check in checks:
        found.setdefault(check.collective, []).append(check)
    return found


def line(axis: str, checks: Sequence[Check]) -> str:
    """One line about one collective on one axis.

    Args:
        axis: its name.
        checks: in all dtypes; the speed is that of the first one.
    """
    first = checks[0]
    start = f"  {axis}  {first.collective:<17}  "
    failed = [check for check in checks if check.failures]
    if failed:
        return start + "; ".join(_failure(check) for check in failed)
    if first.status == NOT_RUN:
        return start + "not run: its ranks are out of step"
    speed = "" if first.speed is None else f"  {first.speed / 1e9:8.3f} GB/s"
    least, middle = first.minimum * 1e3, first.median * 1e3
    return f"{start}ok  min {least:9.3f} ms  median {middle:9.3f} ms{speed}"


def _failure(check: Check) -> str:
    """What went wrong in one check, on which ranks."""
    dtype = f" in {check.dtype}" if check.dtype else ""
    parts = []
    for status in _WORST_FIRST:
        details = {rank: text for rank, (s, text) in check.failures.items() if s == status}
        if details:
            parts.append(_WORDS[status].format(ranks=_ranks(details), dtype=dtype))
            parts[-1] += _details(details)
    return "; ".join(parts)


_WORDS = {
    "wrong": "WRONG on {ranks}{dtype}",
    "error": "error on {ranks}{dtype}",
    "hung": "hung on {ranks}{dtype}",
    "lost": "{ranks} waited in vain",
    "silent": "no answer from {ranks}{dtype}: stopped, dead or starved",
}


def _details(details: dict[int, str]) -> str:
    """What several ranks say, each thing once."""
    said: dict[str, list[int]] = {}
    for rank, text in details.items():
        said.setdefault(text, []).append(rank)
    if len(said) == 1:
        (text,) = said
        return f": {text}" if text else ""
    return ": " + ", ".join(f"{_ranks(ranks)}: {text}" for text, ranks in said.items())


def _blame(checks: Iterable[Check]) -> str:
    """How and on which ranks checks went wrong, without those that only waited."""
    found: dict[str, set[int]] = {}
    for check in checks:
        for rank, (status, _) in check.failures.items():
            found.setdefault(status, set()).add(rank)
    if len(found) > 1:
        found.pop("lost", None)
    return ", ".join(
        f"{_BRIEF[status]} on {_ranks(found[status])}" for status in _WORST_FIRST if status in found
    )


_BRIEF = {
    "wrong": "WRONG",
    "error": "error",
    "hung": "hung",
    "lost": "waited in vain",
    "silent": "no answer",
}


def _ranks(ranks: Iterable[int]) -> str:
    numbers = sorted(ranks)
    return ("rank " if len(numbers) == 1 else "ranks ") + " ".join(map(str, numbers))
