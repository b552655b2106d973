"""Wait for forked ranks: pass signals on, keep time, and say which failure came first."""

import contextlib
import math
import selectors
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from fivefold.parallel_core.errors import RankError
from fivefold.parallel_core.launcher.forked import ForkedRank, Ranks
from fivefold.parallel_core.launcher.rank import STACK_SIGNAL, Failure

_POLL = 0.05  # seconds between looks at signals, deadlines and dead ranks
_SETTLE = 0.2  # seconds in which an earlier failure may still be on its way
_SETTLE_CONSEQUENCE = 2.0  # the same where all we know is that another rank went away
_SETTLE_NAMED = 15.0  # the same where we know which one, and it has not ended yet
# Wrappers such as a task runner pass on the Ctrl-C that the terminal has sent to us already.
_SAME_STROKE = 0.3
_LEAVE = 30.0  # seconds that a rank has to end once its result is here
_STACK_WAIT = 2.0  # seconds that ranks have to write their stacks


class Signals:
    """The SIGINT and SIGTERM that arrived while ranks run."""

    def __init__(self) -> None:
        self.count = 0
        self.last = signal.SIGINT
        self._time = -math.inf

    def note(self, signum: int, frame: FrameType | None) -> None:
        """Be the handler of a signal: only count it."""
        now = time.monotonic()
        if now - self._time >= _SAME_STROKE:
            self.count += 1
            self.last = signal.Signals(signum)
        self._time = now

    def stop(self) -> BaseException:
        """What a process raises that ends because of the last signal."""
        return KeyboardInterrupt() if self.last == signal.SIGINT else SystemExit(128 + self.last)


@contextlib.contextmanager
def counted_signals() -> Iterator[Signals]:
    """Count SIGINT and SIGTERM instead of handling them, where Python lets us."""
    signals, earlier = Signals(), {}
    try:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                # None is a handler of another language, which we could not put back.
                if signal.getsignal(signum) not in (None, signal.SIG_IGN):
                    earlier[signum] = signal.signal(signum, signals.note)
        yield signals
    finally:
        for signum, handler in earlier.items():
            signal.signal(signum, handler)


class Supervisor:
    """Waits for the ranks of one launch.

    Args:
        ranks: the ranks.
        signals: what has arrived for this process.
        timeout: seconds from now until the ranks must have ended; None sets no limit.
        on_interrupt: called with the number of the signal that was passed on.
    """

    def __init__(
        self,
        ranks: Ranks,
        signals: Signals,
        timeout: float | None,
        on_interrupt: Callable[[int], object] | None,
    ):
        self._ranks = ranks
        self._signals = signals
        self._timeout = math.inf if timeout is None else timeout
        self._start = time.monotonic()
        self._on_interrupt = on_interrupt
        self._passed_on = False

    def wait_for_results(self) -> None:
        """Return when every rank has returned.

        Raises:
            RankError: a rank failed, or time ran out.
            KeyboardInterrupt: the ranks ended because of SIGINT.
            SystemExit: the ranks ended because of SIGTERM.
        """
        with _selector(self._ranks) as selector:
            while self._is_open() and not self._is_late():
                for key, _ in selector.select(_POLL):
                    key.data.read()
                for rank in self._ranks:
                    rank.check()
                    if rank.is_over and rank.pipe in selector.get_map():
                        selector.unregister(rank.pipe)
                self._obey()
        self._raise_first()
        running = [rank for rank in self._ranks if not rank.is_over]
        if running:
            raise _too_long(running, f"still ran after the timeout of {self._timeout} s")

    def wait_for_ends(self) -> None:
        """Let the ranks go and return when every one has ended.

        Raises:
            RankError: a rank did not end.
            KeyboardInterrupt: a second SIGINT came.
            SystemExit: a second SIGTERM came.
        """
        self._ranks.release()
        limit = time.monotonic() + _LEAVE
        while running := [rank for rank in self._ranks if rank.process.exitcode is None]:
            running[0].process.join(_POLL)
            self._obey()
            if time.monotonic() > limit:
                raise _too_long(running, "returned a result, but did not end")

    def _is_open(self) -> bool:
        """Whether a rank still runs, and no failure is old enough to be the first one."""
        now = time.monotonic()
        failures = [rank.failure for rank in self._ranks if rank.failure is not None]
        settled = any(now - failure.time > self._patience(failure) for failure in failures)
        return not settled and not all(rank.is_over for rank in self._ranks)

    def _patience(self, failure: Failure) -> float:
        """Seconds in which a failure that explains this one may still be on its way."""
        if not failure.is_consequence:
            return _SETTLE
        if failure.cause is None or self._ranks[failure.cause].is_over:
            return _SETTLE_CONSEQUENCE
        return _SETTLE_NAMED

    def _is_late(self) -> bool:
        return time.monotonic() - self._start > self._timeout

    def _obey(self) -> None:
        """Pass the first signal on; end everything at the second."""
        if self._signals.count > 1:
            self._ranks.send(signal.SIGKILL)
            raise self._signals.stop()
        if self._signals.count == 1 and not self._passed_on:
            self._passed_on = True
            self._ranks.send(signal.SIGTERM)
            if self._on_interrupt is not None:
                self._on_interrupt(self._signals.last)

    def _raise_first(self) -> None:
        """Raise for the failure that the others follow from, if any rank failed."""
        failed = [(rank.failure, rank) for rank in self._ranks if rank.failure is not None]
        if not failed:
            return
        failure, rank = min(failed, key=lambda pair: (pair[0].is_consequence, pair[0].time))
        if failure.is_stop and self._signals.count:
            raise self._signals.stop()
        summary = f"{rank.name}: {failure.message}" if failure.message else None
        raise RankError(self._describe(rank, failure), summary)

    def _describe(self, rank: ForkedRank, failure: Failure) -> str:
        lines = [f"{rank.name} {failure.what}"]
        returned = [r.number for r in self._ranks if r.is_over and r.failure is None]
        if failure.is_consequence and returned:
            lines.append(f"(ranks {returned} had returned before; did they skip a collective?)")
        running = [r for r in self._ranks if not r.is_over] if failure.is_consequence else []
        if running:
            lines.append(f"(ranks {[r.number for r in running]} had not ended; they stand below)")
        return "\n".join([*lines, failure.details, *_stacks(running)]).strip()


def _selector(ranks: Sequence[ForkedRank]) -> selectors.BaseSelector:
    selector = selectors.DefaultSelector()
    for rank in ranks:
        selector.register(rank.pipe, selectors.EVENT_READ, rank)
    return selector


def _too_long(ranks: Sequence[ForkedRank], what: str) -> RankError:
    """The error for ranks that do not end, with the stacks of their threads."""
    names = ", ".join(rank.name for rank in ranks)
    return RankError("\n".join([f"{names} {what}", *_stacks(ranks)]))


def _stacks(ranks: Sequence[ForkedRank]) -> list[str]:
    """Where the threads of ranks stand; a rank that is stopped does not say."""
    if not ranks:
        return []
    for rank in ranks:
        rank.send(STACK_SIGNAL)
    texts: list[str] = []
    deadline = time.monotonic() + _STACK_WAIT
    while time.monotonic() < deadline:
        earlier, texts = texts, [rank.stacks() for rank in ranks]
        if all(texts) and texts == earlier:
            break
        time.sleep(0.05)
    return [
        f"--- {rank.name}\n{text or '(it did not answer)'}"
        for rank, text in zip(ranks, texts, strict=True)
    ]
