"""Start the ranks of a job: forked on this machine, or joined to the ones torchrun started."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar, TypeVarTuple

import torch
import torch.distributed as dist

from fivefold.parallel_core._rank import Failure, RankSetup, identity, use_loopback
from fivefold.parallel_core._ranks import ForkedRank, collect_stacks, end, forked_ranks, watching
from fivefold.parallel_core.errors import ConfigError, ParallelError, RankError

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_POLL = 0.05  # seconds between looks at signals, deadlines and dead ranks
_GRACE = 1.0  # seconds that a rank has to end after SIGTERM
_SETTLE = 0.2  # seconds in which an earlier failure may still be on its way
_SETTLE_CONSEQUENCE = 2.0  # the same where what we have only says that another rank went away
# Wrappers such as a task runner pass on the Ctrl-C that the terminal has sent to us already.
_SAME_STROKE = 0.3
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def launch(
    fn: Callable[[*Ts], T],
    world_size: int,
    *args: *Ts,
    timeout: float | None = None,
    on_interrupt: Callable[[int], object] | None = None,
    threads_per_rank: int = 1,
    collective_timeout: float = 1800.0,
    init: bool = True,
) -> list[T]:
    """Run ``fn(*args)`` in ``world_size`` forked ranks on this machine, joined by gloo.

    ``fn`` and ``args`` need not pickle, as a fork copies them; results must. A result tensor
    travels with the whole storage that it is a view of. No rank outlives the call, nor the
    calling process, even if that is killed.

    Ctrl-C or SIGTERM, where this is the main thread: the first one is passed on to the ranks as
    SIGTERM, once, and waiting goes on, so that an ``fn`` with a handler of its own can come to a
    good end and return; without a handler the ranks end. The second one kills them. Both are
    counted only here: the ranks ignore SIGINT.

    Args:
        fn: what every rank runs; it learns its rank from ``torch.distributed`` or `connect`.
        world_size: number of ranks, at least 1.
        args: arguments of ``fn``.
        timeout: seconds after which the ranks that still run are ended; None waits for ever.
        on_interrupt: called in this process with the signal's number once it is passed on.
        threads_per_rank: threads of torch's intra-op pool. More than 1 can hang where this
            process has run multithreaded ops before, because OpenMP does not survive a fork.
        collective_timeout: seconds after which a collective gives up.
        init: whether the ranks form a process group before ``fn`` runs.

    Returns:
        The results in rank order.

    Raises:
        RankError: a rank raised, died or ended without a result (the first one to do so is
            named, with its traceback), or time ran out (every running rank's stacks are shown).
        ConfigError: an argument is out of its range.
        ParallelError: this platform has no fork, or this process is in a process group.
        KeyboardInterrupt: the ranks ended because of Ctrl-C.
        SystemExit: the ranks ended because of SIGTERM; the status is 143.
    """
    _check(world_size, timeout, threads_per_rank, collective_timeout, init)
    folder = Path(tempfile.mkdtemp(prefix="fivefold-launch-"))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    setups = [
        RankSetup(
            rank=rank,
            world_size=world_size,
            folder=folder,
            threads=threads_per_rank,
            collective_timeout=collective_timeout,
            init=init,
            parent=os.getpid(),
            signal_mask=mask,
        )
        for rank in range(world_size)
    ]
    try:
        with _counted_signals() as signals, forked_ranks(fn, args, setups, _GRACE) as ranks:
            _wait(ranks, signals, timeout, on_interrupt)
            results = [rank.result() for rank in ranks]
            end(ranks, 10 * _GRACE)
        return results
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check(
    world_size: int,
    timeout: float | None,
    threads_per_rank: int,
    collective_timeout: float,
    init: bool,
) -> None:
    if world_size < 1:
        raise ConfigError(f"world_size={world_size}: launch() needs at least 1 rank")
    if timeout is not None and not timeout > 0:
        raise ConfigError(f"timeout={timeout}: must be a number of seconds above 0, or None")
    if not collective_timeout > 0:
        raise ConfigError(f"collective_timeout={collective_timeout}: must be above 0 seconds")
    if threads_per_rank < 1:
        raise ConfigError(f"threads_per_rank={threads_per_rank}: must be at least 1")
    if "fork" not in multiprocessing.get_all_start_methods():
        raise ParallelError(
            f"launch() starts its ranks by fork, which {sys.platform} does not have; start the"
            f" {world_size} ranks with torchrun and call connect() in each"
        )
    if init and dist.is_initialized():
        raise ParallelError(
            f"launch() forks ranks that form a process group of {world_size}, but this process is"
            f" in one of {dist.get_world_size()} already; disconnect() first"
        )


class _Signals:
    """The SIGINT and SIGTERM that arrived while ranks run."""

    def __init__(self) -> None:
        self.count = 0
        self.last = signal.SIGINT
        self._time = -_SAME_STROKE

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
def _counted_signals() -> Iterator[_Signals]:
    """Count SIGINT and SIGTERM instead of handling them, where Python lets us."""
    signals, earlier = _Signals(), {}
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


def _wait(
    ranks: Sequence[ForkedRank],
    signals: _Signals,
    timeout: float | None,
    on_interrupt: Callable[[int], object] | None,
) -> None:
    """Return when every rank has returned; raise for the first one that failed."""
    start, passed_on = time.monotonic(), 0
    with watching(ranks) as look:
        while not all(rank.is_over for rank in ranks) and not _has_settled(ranks):
            look(_POLL)
            if signals.count > 1:
                _kill(ranks)
                raise signals.stop()
            if signals.count > passed_on:
                passed_on = signals.count
                _pass_on(ranks, signals, on_interrupt)
            if timeout is not None and time.monotonic() - start > timeout:
                break
    _raise_first(ranks, signals)
    running = [rank for rank in ranks if not rank.is_over]
    if running:
        raise RankError(_timeout_message(ranks, running, timeout))


def _pass_on(
    ranks: Sequence[ForkedRank], signals: _Signals, on_interrupt: Callable[[int], object] | None
) -> None:
    for rank in ranks:
        rank.send(signal.SIGTERM)
    if on_interrupt is not None:
        on_interrupt(signals.last)


def _kill(ranks: Sequence[ForkedRank]) -> None:
    for rank in ranks:
        rank.send(signal.SIGKILL)


def _has_settled(ranks: Sequence[ForkedRank]) -> bool:
    """Whether a rank has failed long enough ago for an earlier failure to have been seen."""
    failures = [rank.failure for rank in ranks if rank.failure is not None]
    waits = [_SETTLE_CONSEQUENCE if f.is_consequence else _SETTLE for f in failures]
    now = time.monotonic()
    return any(now - f.time > wait for f, wait in zip(failures, waits, strict=True))


def _raise_first(ranks: Sequence[ForkedRank], signals: _Signals) -> None:
    """Raise for the failure that the others follow from, if any rank failed."""
    failed = [(rank.failure, rank) for rank in ranks if rank.failure is not None]
    if not failed:
        return
    failure, rank = min(failed, key=lambda pair: (pair[0].is_consequence, pair[0].time))
    if failure.is_stop and signals.count:
        raise signals.stop()
    raise RankError(_failure_message(rank, failure, ranks))


def _failure_message(rank: ForkedRank, failure: Failure, ranks: Sequence[ForkedRank]) -> str:
    lines = [f"{rank.name} {failure.what}"]
    returned = [r.setup.rank for r in ranks if r.is_complete and r.failure is None]
    if failure.is_consequence and returned:
        lines.append(f"(ranks {returned} had returned before; did they skip a collective?)")
    return "\n".join([*lines, failure.details]).strip()


def _timeout_message(
    ranks: Sequence[ForkedRank], running: Sequence[ForkedRank], timeout: float | None
) -> str:
    numbers = ", ".join(str(rank.setup.rank) for rank in running)
    return (
        f"{len(running)} of {len(ranks)} ranks still ran after the timeout of {timeout} s:"
        f" {numbers}\n{collect_stacks(running)}"
    )


def under_torchrun() -> bool:
    """Whether this process was started as a rank of a job by torchrun or in the same way."""
    return all(name in os.environ for name in _TORCHRUN)


def connect(*, device_type: str | None = None, timeout: float = 1800.0) -> tuple[int, int]:
    """Find out which rank this process is, and join the others if torchrun started it.

    Under torchrun the process group is made from the environment: gloo on the CPU, and nccl for
    CUDA tensors, with the GPU of number LOCAL_RANK as the current device. In a rank of `launch`
    the group is there already. Anywhere else this is the only rank and no group is made. Calling
    it again is harmless.

    Args:
        device_type: "cpu" or "cuda"; None takes CUDA where there is a GPU.
        timeout: seconds after which a collective gives up.

    Returns:
        (rank, number of ranks).

    Raises:
        ConfigError: ``device_type`` is another, or its GPU does not exist, or only a part of
            what torchrun sets is set.
    """
    if device_type not in (None, "cpu", "cuda"):
        raise ConfigError(f"device_type={device_type!r}: must be 'cpu', 'cuda' or None")
    if not dist.is_initialized():
        present = [name for name in _TORCHRUN if name in os.environ]
        if not present:
            return identity() or (0, 1)
        if not under_torchrun():
            missing = [name for name in _TORCHRUN if name not in present]
            raise ConfigError(f"{present} set but not {missing}: torchrun sets all or none")
        _join_torchrun(device_type, timedelta(seconds=timeout))
    return dist.get_rank(), dist.get_world_size()


def disconnect() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _join_torchrun(device_type: str | None, timeout: timedelta) -> None:
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = {"backend": "gloo"}
    if device_type == "cuda":
        device = _cuda_device(int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        options = {"backend": "cpu:gloo,cuda:nccl", "device_id": device}
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        use_loopback()
    dist.init_process_group(timeout=timeout, **options)


def _cuda_device(local_rank: int) -> torch.device:
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"LOCAL_RANK={local_rank}, but this machine has {count} GPUs: start at most {count}"
            " ranks per machine, or ask for device_type='cpu'"
        )
    return torch.device("cuda", local_rank)
