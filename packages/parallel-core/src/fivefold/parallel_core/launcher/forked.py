"""The parent's view of forked ranks: start them, watch them, read from them, end them."""

import contextlib
import fcntl
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

from fivefold.parallel_core.errors import RankError
from fivefold.parallel_core.launcher.rank import (
    FAILURE,
    HEADER,
    Failure,
    Job,
    Origin,
    run_rank,
)

_CHUNK = 1 << 20
_ENTRY = f'{run_rank.__code__.co_filename}"'
_HELD = (signal.SIGINT, signal.SIGTERM)


class ForkedRank:
    """One forked rank: its process, what came through its pipe, and how it ended.

    Args:
        number: its rank.
        job: what every rank has to know.
        origin: what every rank inherits.
        fn: what the rank runs.
        args: arguments of ``fn``.
    """

    def __init__(
        self,
        number: int,
        job: Job,
        origin: Origin,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
    ):
        self.number = number
        self.name = f"rank {number} of {job.world_size}"
        self._stack_file = origin.stack_file(number)
        self.failure: Failure | None = None
        self._message = bytearray()
        self._at_end = False
        self.pipe, write_end = _wide_pipe()
        context = multiprocessing.get_context("fork")
        self.process: ForkProcess = context.Process(
            target=run_rank, args=(number, job, origin, write_end, fn, args), name=self.name
        )
        try:
            _start(self.process)
        except BaseException:
            os.close(self.pipe)
            raise
        finally:
            os.close(write_end)

    @property
    def is_complete(self) -> bool:
        """Whether the rank's whole message is here."""
        if len(self._message) < HEADER.size:
            return False
        return len(self._message) == HEADER.size + int(HEADER.unpack_from(self._message)[1])

    @property
    def is_over(self) -> bool:
        """Whether nothing more is expected of the rank."""
        return self.is_complete or self.failure is not None

    def read(self) -> None:
        """Take what is in the pipe now; note a failure that has arrived in full."""
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self.pipe, _CHUNK):
                self._message += chunk
            self._at_end = True
        if self.is_complete and self._message.startswith(FAILURE):
            self.failure = pickle.loads(self._body())

    def check(self) -> None:
        """Note the failure of a rank that is dead and sent no complete message."""
        if self.is_over or (self.process.exitcode is None and not self._at_end):
            return
        self.read()
        self.process.join(timeout=1.0)  # a closed pipe comes a moment before the end
        if not self.is_over:
            self.failure = self._death()

    def result(self) -> Any:
        """What the rank's function returned.

        Raises:
            RankError: the bytes that arrived do not unpickle here.
        """
        try:
            return pickle.loads(self._body())
        except Exception as error:
            raise RankError(f"{self.name}: its result does not unpickle: {error!r}") from error

    def send(self, signum: int) -> None:
        """Send a signal to the rank unless it has ended."""
        if self.process.pid is not None and self.process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signum)

    def stacks(self) -> str:
        """What the rank has written into its stack file, without the frames that led to ``fn``."""
        try:
            lines = self._stack_file.read_text(errors="replace").splitlines()
        except OSError:
            return ""
        kept, is_ours = [], False
        for line in lines:
            is_ours = line.startswith("  File ") and (is_ours or _ENTRY in line)
            if not is_ours:
                kept.append(line)
        return "\n".join(kept).strip()

    def close(self) -> None:
        """Give back the files of a rank that has ended."""
        os.close(self.pipe)
        with contextlib.suppress(ValueError):  # cannot be waited for, as when SIGCHLD is ignored
            self.process.close()

    def _body(self) -> memoryview:
        return memoryview(self._message)[HEADER.size :]

    def _death(self) -> Failure:
        code = self.process.exitcode
        if code is None:
            what = "went away without returning a result; its exit status is unknown"
        elif code < 0:
            what = f"was killed by signal {-code} ({_signal_name(-code)})"
        else:
            what = f"exited with status {code} without returning a result"
        if code == -signal.SIGKILL:
            what += "; if nobody sent it, the machine may have run out of memory"
        return Failure(
            time=time.monotonic(),
            what=what,
            details=self.stacks(),
            is_stop=code == -signal.SIGTERM,
        )


def _signal_name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:
        return "no name"


def _wide_pipe() -> tuple[int, int]:
    """A pipe that is read without blocking and holds 1 MiB where the system lets it.

    The usual 64 KiB would cost a large result one switch between processes each.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # beyond what this user may have
            fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, _CHUNK)
    return read_end, write_end


def _start(process: ForkProcess) -> None:
    with warnings.catch_warnings():
        # Python 3.12 warns of locks held by other threads at the fork; torch's own threads take
        # care of themselves, and a rank touches nobody else's.
        warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
        process.start()


class Ranks(list[ForkedRank]):
    """All ranks of a launch, in order.

    Args:
        release: file descriptor to write to when all have returned.
    """

    def __init__(self, release: int):
        super().__init__()
        self._release = release

    def release(self) -> None:
        """Let the ranks that have returned their results end."""
        os.write(self._release, b"1")

    def send(self, signum: int) -> None:
        """Send a signal to those that run."""
        for rank in self:
            rank.send(signum)


@contextlib.contextmanager
def forked_ranks(
    job: Job, fn: Callable[..., Any], args: tuple[Any, ...], grace: float
) -> Iterator[Ranks]:
    """Start the ranks; on leaving, end those that still run and give everything back.

    Args:
        job: what every rank has to know.
        fn: what every rank runs.
        args: arguments of ``fn``.
        grace: seconds between asking a rank to end and killing it.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="fivefold-launch-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        released, release = os.pipe()
        stack.callback(os.close, released)
        stack.callback(os.close, release)
        ranks = Ranks(release)
        stack.callback(_end, ranks, grace)
        # A signal between the fork and the rank's own handlers would run the parent's there.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
        origin = Origin(folder=folder, parent=os.getpid(), signal_mask=mask, release=released)
        try:
            for number in range(job.world_size):
                ranks.append(ForkedRank(number, job, origin, fn, args))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield ranks


def _end(ranks: Ranks, grace: float) -> None:
    ranks.release()
    for rank in ranks:
        if not rank.is_complete:
            rank.send(signal.SIGTERM)
    _join(ranks, grace)
    ranks.send(signal.SIGKILL)
    _join(ranks, 5.0)
    for rank in ranks:
        rank.close()


def _join(ranks: Sequence[ForkedRank], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for rank in ranks:
        rank.process.join(timeout=max(deadline - time.monotonic(), 0.0))
