"""A run of the command: its cases one after the other, printed and written as they end."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from fivefold.kernels.bench import machine, record, table
from fivefold.kernels.bench.case import BOTH, FORWARD, Contest, Limits, failed
from fivefold.kernels.bench.command import DEVICES, DTYPES
from fivefold.kernels.bench.contenders import libraries_of
from fivefold.kernels.bench.record import Case
from fivefold.kernels.bench.roofline import Roofline, total
from fivefold.kernels.bench.stopwatch import CPUStopwatch, GPUStopwatch
from fivefold.kernels.errors import KernelInputError
from fivefold.kernels.files import check_writable
from fivefold.kernels.samples import Inputs, Maker, OpSamples, Sample, load
from fivefold.kernels.selection import select


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the command line asked for.

    Attributes:
        device: a device's type.
        dtypes: to measure in; empty means those that suit the device.
        phases: to time.
        threads: of the CPU.
        limits: of each case.
        json: the file to write, if any.
    """

    device: str
    dtypes: tuple[torch.dtype, ...]
    phases: tuple[str, ...]
    threads: int
    limits: Limits
    json: Path | None


def settings_of(options: argparse.Namespace) -> Settings:
    """Read the command line.

    Raises:
        KernelInputError: a name that is not known, a device that is not there, or a file that
            cannot be written.
    """
    phases = {"forward": (FORWARD,), "backward": (BOTH,), "both": (FORWARD, BOTH)}
    check_writable(options.json)
    return Settings(
        device=_device(options.device),
        dtypes=_dtypes(options.dtype),
        phases=phases[options.only],
        threads=options.threads,
        limits=Limits(
            repeats=options.repeats,
            seconds=options.seconds,
            compiled=not options.no_compile,
            every_backend=options.backends == "all",
        ),
        json=options.json,
    )


class Session:
    """Measures the ops that were asked for.

    Args:
        settings: how.
        ops: names, ``rms_norm`` or ``package/op``; none means all.
        say: takes the lines of the table.

    Attributes:
        cases: what was measured.
        failed: whether an op of ours was not timed, or could not be imported.

    Raises:
        KernelInputError: there is no such op, or none of its samples has the dtypes.
    """

    def __init__(self, settings: Settings, ops: Sequence[str], say: Callable[[str], None]):
        self.cases: list[Case] = []
        self.failed = False
        self._settings, self._say = settings, say
        self._started = datetime.now(UTC).isoformat(timespec="seconds")
        self._libraries: set[str] = set()
        self._complete = False
        self._broken: list[str] = []
        self._work = list(self._plan(select(ops)))
        if not self._work and not self._broken:
            asked = ", ".join(_short(dtype) for dtype in settings.dtypes)
            raise KernelInputError(
                f"no sample of {', '.join(ops) or 'any op'} is made for {asked}; leave --dtype out "
                "for one that fits each"
            )
        self._machine = machine.describe(settings.device, settings.threads)
        self._watch = (
            GPUStopwatch() if settings.device == "cuda" else CPUStopwatch(settings.threads)
        )
        self._roofline = Roofline(settings.device, self._watch)

    def run(self) -> None:
        """Measure all, and print and write each case when it ends."""
        versions = machine.versions(self._libraries)
        for line in table.heading(self._machine, versions, torch.cuda.is_available()):
            self._say(line)
        for line in self._broken:
            self._say(line)
        self.failed = bool(self._broken)
        with _threads(self._settings.threads):
            for package, op, sample, dtype in self._work:
                for case in self._measure(package, op, sample, dtype):
                    self._keep(case)
        self._complete = True
        self._conclude()

    def interrupted(self) -> None:
        """Conclude with the cases that were measured before Ctrl-C."""
        self._say(f"\ninterrupted after {len(self.cases)} cases")
        self._conclude()

    def _plan(
        self, ops: list[tuple[str, str]]
    ) -> Iterator[tuple[str, OpSamples, Sample, torch.dtype]]:
        for package, name in ops:
            try:
                op = load(name, package)
            except Exception as error:
                self._broken.append(f"{package}/{name}: {failed(name, error).reason}")
                continue
            self._libraries |= libraries_of(op)
            on_gpu = self._settings.device == "cuda"
            for sample in op.real if on_gpu else op.laptop:
                for dtype in self._dtypes(op, sample):
                    yield package, op, sample, dtype

    def _dtypes(self, op: OpSamples, sample: Sample) -> tuple[torch.dtype, ...]:
        """Those that were asked for and fit; unasked, float32 on a CPU if it fits."""
        if self._settings.device == "cuda":
            usual = sample.dtypes or op.real_dtypes
        else:
            fit = sample.dtypes or op.dtypes
            usual = (torch.float32,) if torch.float32 in fit else fit[:1]
        if not self._settings.dtypes:
            return usual
        fit = sample.dtypes or (*op.dtypes, *op.real_dtypes)
        return tuple(dtype for dtype in self._settings.dtypes if dtype in fit)

    def _measure(
        self, package: str, op: OpSamples, sample: Sample, dtype: torch.dtype
    ) -> Iterator[Case]:
        inputs: Inputs | None = None
        for phase in self._settings.phases:
            case = Case(
                package=package, op=op.name, sample=sample.name, dtype=_short(dtype), phase=phase
            )
            try:
                if inputs is None:
                    inputs = sample.inputs(Maker(dtype=dtype, device=self._settings.device))
                if self._contest(case, op, inputs, dtype):
                    yield case
            except Exception as error:
                case.results = [failed("ours", error)]
                yield case

    def _contest(self, case: Case, op: OpSamples, inputs: Inputs, dtype: torch.dtype) -> bool:
        settings = self._settings
        contest = Contest(op, inputs, dtype, case.phase, settings.device, settings.limits)
        if not contest.run(case, self._watch):
            return False
        forward, backward = op.cost(inputs)
        cost = forward if case.phase == FORWARD else total(forward, backward)
        case.bytes, case.flops = cost.bytes, cost.flops
        case.floor_seconds = self._roofline.floor(cost, dtype)
        return True

    def _keep(self, case: Case) -> None:
        self.cases.append(case)
        self.failed |= case.results[0].status != "timed"
        for line in table.section(case):
            self._say(line)
        self._write()

    def _conclude(self) -> None:
        self._say("")
        for line in table.complaints(self.cases):
            self._say(line)
        self._say(table.rates(self._roofline.copy_rate, self._roofline.matmul_rates))
        self._write()

    def _write(self) -> None:
        if self._settings.json is None:
            return
        limits = self._settings.limits
        content = {
            "schema": record.SCHEMA,
            "started": self._started,
            "complete": self._complete,
            "machine": self._machine,
            "versions": machine.versions(self._libraries),
            "limits": {"repeats": limits.repeats, "seconds": limits.seconds},
            "roofline": {
                "copy_bytes_per_second": self._roofline.copy_rate,
                "matmul_flops_per_second": self._roofline.matmul_rates,
            },
            "broken": self._broken,
            "cases": [record.as_json(case) for case in self.cases],
        }
        record.write(self._settings.json, content)


def _device(asked: str | None) -> str:
    there = torch.cuda.is_available()
    if asked is None:
        return "cuda" if there else "cpu"
    if asked not in DEVICES:
        raise KernelInputError(f"there is no device {asked!r}; there are {', '.join(DEVICES)}")
    if asked == "cuda" and not there:
        raise KernelInputError(
            f"asked for cuda, but torch {torch.__version__} finds no CUDA device here; there is cpu"
        )
    return asked


def _dtypes(asked: str | None) -> tuple[torch.dtype, ...]:
    names = [] if asked is None else asked.split(",")
    for name in names:
        if name not in DTYPES:
            raise KernelInputError(f"there is no dtype {name!r}; there are {', '.join(DTYPES)}")
    return tuple(getattr(torch, name) for name in dict.fromkeys(names))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
