"""One case: every contender is checked against ours, then those that agree are timed together."""

import gc
import logging
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fivefold.kernels.bench import machine
from fivefold.kernels.bench.agreement import disagreement
from fivefold.kernels.bench.calls import Call, Results, Values, Weights, output_gradients
from fivefold.kernels.bench.contenders import (
    Choices,
    Contender,
    choices,
    other_backends,
    others,
    our_name,
)
from fivefold.kernels.bench.record import Case, Result
from fivefold.kernels.bench.rounds import Rounds, Timer, interleave
from fivefold.kernels.bench.stopwatch import LAUNCH_BOUND_SECONDS, GPUStopwatch, Stopwatch
from fivefold.kernels.samples import Inputs, OpSamples

FORWARD, BOTH = "forward", "forward+backward"


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How much is measured.

    Attributes:
        repeats: rounds of a case, at most.
        seconds: for the rounds of a case.
        compiled: whether torch.compile takes part.
        every_backend: whether all of our backends do.
    """

    repeats: int
    seconds: float
    compiled: bool
    every_backend: bool


class Contest:
    """The contenders of one op on one sample's inputs, in one phase.

    Args:
        op: its samples.
        inputs: of the call.
        dtype: of its floating-point tensors.
        phase: forward, or forward and backward.
        device: where the inputs are.
        limits: of the measurement.
    """

    def __init__(
        self,
        op: OpSamples,
        inputs: Inputs,
        dtype: torch.dtype,
        phase: str,
        device: str,
        limits: Limits,
    ):
        self._op, self._inputs = op, inputs
        self._rounding = op.rounds_to or dtype
        self._phase, self._device, self._limits = phase, device, limits
        self._calls: dict[str, Call] = {}
        self._results: dict[str, Result] = {}

    def run(self, case: Case, watch: Stopwatch) -> bool:
        """Fill in the case; False where the op has no gradient to time."""
        torch.compiler.reset()
        case.basis = watch.basis
        with torch.set_grad_enabled(self._phase == BOTH):
            try:
                weights = self._weights()
                if self._phase == BOTH and not any(w is not None for w in weights):
                    return False
                values = Values(self._inputs, weights)
                made, expected = self._ours(values)
            except Exception as error:
                self._results["ours"] = failed("ours", error)
            else:
                for contender in self._field(made):
                    result = self._check(contender, expected, values)
                    if result is not None:
                        self._results[contender.name] = result
                del expected
                self._time(watch)
        case.results = list(self._results.values())
        return True

    def _weights(self) -> Weights:
        return output_gradients(self._op.function, self._inputs) if self._phase == BOTH else ()

    def _ours(self, values: Values) -> tuple[Choices, Results]:
        call = Call(self._op.function, values)
        with choices() as made:
            expected = call.results()
        name = our_name(made)
        self._calls[name] = call
        self._results[name] = Result(name=name, status="timed")
        return made, expected

    def _field(self, made: Choices) -> list[Contender]:
        ours = other_backends(self._op, made, self._device) if self._limits.every_backend else []
        return ours + others(self._op, compiled=self._limits.compiled)

    def _check(self, contender: Contender, expected: Results, values: Values) -> Result | None:
        """Run a contender once; it is kept for timing if it computes what ours does.

        Returns:
            None where it does not take such inputs.
        """
        name = contender.name
        try:
            if not contender.takes(self._inputs):
                return None
            absent = machine.missing(contender.libraries)
            if absent:
                return Result(name=name, status="not installed", reason=", ".join(absent))
            with _no_logging():
                call = Call(contender.make(), values)
                found = call.results()
            reason = disagreement(found, expected, self._rounding)
        except Exception as error:
            return failed(name, error)
        if reason is not None:
            return Result(name=name, status="wrong", reason=reason)
        self._calls[name] = call
        return Result(name=name, status="timed")

    def _time(self, watch: Stopwatch) -> None:
        rounds = self._rounds(watch.timer)
        for name, error in rounds.errors.items():
            self._results[name] = failed(name, error)
            del self._calls[name]
        if isinstance(watch, GPUStopwatch) and _launch_bound(rounds, watch.basis):
            for name, error in self._rounds(watch.graph_timer).errors.items():
                self._results[name].reason = f"no CUDA graph: {one_line(error)}"

    def _rounds(self, timer: Callable[[Call], Timer]) -> Rounds:
        """Time all calls together; what could not be prepared is among the errors."""
        timers, errors = {}, {}
        for name, call in self._calls.items():
            try:
                timers[name] = timer(call)
            except Exception as error:
                errors[name] = error
        with _no_collection():
            rounds = interleave(timers, repeats=self._limits.repeats, seconds=self._limits.seconds)
        rounds.errors |= errors
        for name, seconds in rounds.seconds.items():
            self._results[name].seconds |= seconds
        return rounds


def failed(name: str, error: Exception) -> Result:
    """What is recorded of a contender that raised."""
    return Result(
        name=name,
        status="not installed" if isinstance(error, ModuleNotFoundError) else "error",
        reason=one_line(error),
    )


def one_line(error: Exception) -> str:
    """Kind and beginning of an error."""
    text = " ".join(str(error).split())
    kind = type(error).__name__
    return f"{kind}: {text[:160]}{'...' * (len(text) > 160)}" if text else kind


def _launch_bound(rounds: Rounds, clock: str) -> bool:
    medians = [statistics.median(times[clock]) for times in rounds.seconds.values()]
    return bool(medians) and min(medians) < LAUNCH_BOUND_SECONDS


@contextmanager
def _no_logging() -> Iterator[None]:
    """Libraries log at length what is recorded here in a line."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _no_collection() -> Iterator[None]:
    """A garbage collection takes longer than a small op, and hits whoever is being timed."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
