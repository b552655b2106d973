"""Every collective on every group of a layout, run by all ranks together."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from fivefold.parallel_core.doctor.probes import DTYPES, PROBES, Call, Values, barrier, difference
from fivefold.parallel_core.doctor.report import Check, Examined, Report, by_collective, line
from fivefold.parallel_core.doctor.rounds import Outcome, Rounds, Verdict
from fivefold.parallel_core.errors import ConfigError, FollowUpError, RankError
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.ledger import CommLedger
from fivefold.parallel_core.topology import AXES, Axis, Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to examine.

    Attributes:
        nbytes: of the whole tensor of each collective.
        repeats: timed calls of each.
        timeout: seconds that one check may take before it is said to hang.
    """

    nbytes: int = 1 << 20
    repeats: int = 5
    timeout: float = 60.0

    def __post_init__(self) -> None:
        for name in ("nbytes", "repeats", "timeout"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must be above 0")


def warm_up() -> None:
    """Have torch import now what the first operation under a ledger needs: a second's work."""
    with CommLedger(Topology.local()):
        torch.zeros(1).add_(1)


def examine(
    layout: Layout,
    options: Options,
    device: torch.device,
    rounds: Rounds,
    tell: Callable[[str], None],
) -> Report:
    """Run every collective on every group, and compare each result with what it must be.

    All ranks of the job call this. A failure ends the checks of its axis, as the ranks of a
    group do not agree any more on what comes next; the other axes follow.

    Args:
        layout: of all ranks of the job.
        options: how to examine.
        device: of the tensors of this rank.
        rounds: of this job.
        tell: takes each line of text as soon as it is known, on rank 0.

    Returns:
        What was found: all of it on rank 0.

    Raises:
        RankError: the groups could not be made, or a rank is gone, so that no report can be.
    """
    return _Examination(layout, options, device, rounds, tell).run()


def shared_groups(layout: Layout) -> list[Examined]:
    """All axes of a topology and the world, those with equal groups together."""
    found: dict[tuple[tuple[int, ...], ...], list[str]] = {}
    for name in AXES:
        groups = tuple(sorted(tuple(group) for group in layout.groups(name)))
        found.setdefault(groups, []).append(name)
    found.setdefault((tuple(range(layout.world_size)),), []).append("world")
    return [Examined(tuple(names), groups) for groups, names in found.items()]


class _Examination:
    def __init__(
        self,
        layout: Layout,
        options: Options,
        device: torch.device,
        rounds: Rounds,
        tell: Callable[[str], None],
    ):
        self.layout, self.options, self.device, self.rounds = layout, options, device, rounds
        self.tell = tell if rounds.rank == 0 else lambda text: None
        settings = {
            "device": device.type,
            "bytes": options.nbytes,
            "repeats": options.repeats,
            "timeout": options.timeout,
        }
        self.report = Report(layout, settings, shared_groups(layout))
        self.stop = False

    def run(self) -> Report:
        topology = self._meet()
        self.tell(
            f"\nwhole tensors of {self.options.nbytes} bytes on {self.device.type}; times of the"
            " slowest rank in float32; GB/s of the median, of what one rank sends in a ring"
        )
        for examined in self.report.axes:
            if len(examined.groups[0]) == 1:
                self.tell(f"{examined.name}: one rank, sends nothing")
            else:
                self.tell(examined.heading())
                self._examine(examined, topology)
        return self.report

    def _meet(self) -> Topology:
        made: list[Topology] = []

        def make() -> Verdict:
            made.append(Topology(self.layout, device=self.device))
            return Verdict(status="ok")

        outcome = self.rounds.run(make, tuple(range(self.layout.world_size)))
        check = Check(collective="new_group", dtype=None, verdicts=outcome.verdicts)
        if check.failures:
            raise RankError(f"the groups cannot be made: {line('world', [check]).strip()}")
        if outcome.stop or not outcome.in_step or not made:
            raise FollowUpError("the groups cannot be made; rank 0 says why", cause=0)
        return made[0]

    def _examine(self, examined: Examined, topology: Topology) -> None:
        name = examined.axes[0]
        axis = topology.world if name == "world" else topology.axis(name)
        in_step = not self.stop
        for collective, dtype in _plan():
            outcome = Outcome(verdicts=(), in_step=False, stop=self.stop)
            if in_step:
                outcome = self.rounds.run(self._work(topology, axis, collective, dtype), axis.ranks)
            in_step, self.stop = outcome.in_step, outcome.stop
            examined.checks.append(
                Check(collective=collective, dtype=_name(dtype), verdicts=outcome.verdicts)
            )
            if dtype in (None, DTYPES[-1]):
                self.tell(line(examined.name, by_collective(examined.checks)[collective]))

    def _work(
        self, topology: Topology, axis: Axis, collective: str, dtype: torch.dtype | None
    ) -> Callable[[], Verdict]:
        key = f"barrier/{axis.name}/{axis.ranks[0]}"

        def work() -> Verdict:
            if dtype is None:
                return self._perform(barrier(axis, self.rounds.work_store, key), topology)
            values = Values.of_size(axis, dtype, self.device, self.options.nbytes)
            return self._perform(PROBES[collective](values), topology)

        return work

    def _perform(self, call: Call, topology: Topology) -> Verdict:
        with CommLedger(topology) as ledger:
            wrong = difference(call.run(), call.expected)
        seconds = []
        for _ in range(self.options.repeats):
            self._synchronize()
            start = time.perf_counter()
            found = (call.timed or call.run)()
            self._synchronize()
            seconds.append(time.perf_counter() - start)
            # To the end whatever was found: the other ranks of the group go on as well.
            if isinstance(found, torch.Tensor):
                wrong = wrong or difference(found, call.expected)
        return Verdict(
            status="wrong" if wrong else "ok",
            detail=wrong,
            seconds=tuple(seconds),
            sent=sum(entry.bytes for entry in ledger.entries.values()),
        )

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _plan() -> Iterator[tuple[str, torch.dtype | None]]:
    """All checks of one axis: collective and dtype."""
    for collective in PROBES:
        for dtype in DTYPES:
            yield collective, dtype
    yield "barrier", None


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")
