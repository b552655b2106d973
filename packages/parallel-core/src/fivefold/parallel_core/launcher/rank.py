"""The life of one forked rank: set up the process, run the function, report to the parent."""

import ctypes
import faulthandler
import gc
import io
import os
import pickle
import re
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from fivefold.parallel_core.background import wait_for_all
from fivefold.parallel_core.errors import EXPECTED, FollowUpError
from fivefold.parallel_core.launcher.world import join

HEADER = struct.Struct("=cQ")
"""What precedes every message to the parent: its kind and the number of bytes that follow."""
RESULT, FAILURE = b"r", b"f"
STACK_SIGNAL: int = getattr(signal, "SIGUSR1", 0)
"""Makes a rank write the stacks of its threads into its stack file."""
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
"""What torchrun sets in the environment of every rank; only the launcher looks at it."""

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_LINGER = 5.0  # seconds
_LOST_PEER = re.compile(
    r"gloo/transport|connectFullMesh|Connection (closed|reset|refused)|Broken pipe"
)

_identity: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What every rank of a launch has to know.

    Args:
        world_size: number of ranks.
        threads: threads of torch's intra-op pool in each.
        collective_timeout: seconds after which a collective gives up.
        init: whether the ranks join a gloo process group.
    """

    world_size: int
    threads: int
    collective_timeout: float
    init: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What the ranks of a launch inherit from the process that forks them.

    Args:
        folder: private folder, for the rendezvous and the stack files.
        parent: process id of the forking process.
        signal_mask: signals that it blocks when it is not forking.
        release: file descriptor that becomes readable when every rank has ended its work.
    """

    folder: Path
    parent: int
    signal_mask: Iterable[int]
    release: int

    def stack_file(self, rank: int) -> Path:
        """Where the stacks of a rank go, on request or when it crashes."""
        return self.folder / f"rank-{rank}.stacks"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a rank ended without a result.

    Args:
        time: when, in seconds of the machine's monotonic clock, which all ranks share.
        what: one line that continues "rank 3 of 8".
        details: traceback or stacks; may be empty.
        message: the error's own words where they say all that a user needs to know; else empty.
        is_consequence: another rank went away first, this one only noticed.
        cause: the rank that says why this one ended, where it is known.
        is_stop: the rank ended because it was asked to.
    """

    time: float
    what: str
    details: str = ""
    message: str = ""
    is_consequence: bool = False
    cause: int | None = None
    is_stop: bool = False

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """Describe an exception that left the rank's function."""
        summary = "".join(traceback.format_exception_only(error)).strip()
        return cls(
            time=time.monotonic(),
            what=f"failed: {summary}",
            details="".join(traceback.format_exception(type(error), error, _frames(error))).strip(),
            message=str(error) if isinstance(error, EXPECTED) else "",
            is_consequence=isinstance(error, FollowUpError) or _lost_a_peer(error),
            cause=error.cause if isinstance(error, FollowUpError) else None,
            is_stop=isinstance(error, KeyboardInterrupt | SystemExit),
        )


def identity() -> tuple[int, int] | None:
    """(rank, world size) inside a rank that ``launch`` forked, None elsewhere."""
    return _identity


def run_rank(
    rank: int, job: Job, origin: Origin, pipe: int, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """Be a rank: run ``fn(*args)`` and write its result or its failure to the file ``pipe``."""
    global _identity
    _identity = (rank, job.world_size)
    _prepare(origin, origin.stack_file(rank))
    torch.set_num_threads(job.threads)
    try:
        if job.init:
            timeout = timedelta(seconds=job.collective_timeout)
            join(rank, job.world_size, timeout, origin.folder / "rendezvous")
        result = fn(*args)
        wait_for_all()
        kind, body = RESULT, _pickled(result)
    except BaseException as error:
        kind, body = FAILURE, pickle.dumps(Failure.of(error))
    _send(pipe, kind, body)
    if kind == RESULT and dist.is_initialized():
        _linger(origin.release)
        dist.destroy_process_group()


def _pickled(result: Any) -> bytes:
    try:
        return pickle.dumps(result, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        error.add_note("What fn returns must pickle: it travels to the launching process.")
        raise


def _linger(release: int) -> None:
    """Keep the connections up until the other ranks have returned too.

    A rank that is through may be ahead of one that still reads the same collective or connects
    the same new group, which would take the end of this one for a crash. The limit is there for
    ranks that wait for a collective that this one has left out: they should hear of it.
    """
    poll = select.poll()
    poll.register(release, select.POLLIN)
    poll.poll(_LINGER * 1000)


def _send(pipe: int, kind: bytes, body: bytes) -> None:
    try:
        with open(pipe, "wb") as file:
            file.write(HEADER.pack(kind, len(body)))
            file.write(body)
    except BrokenPipeError:
        pass  # nobody is left to read it


def _prepare(origin: Origin, stack_file: Path) -> None:
    """Make a process of its own out of the copy of the parent that a fork leaves."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the ranks as well
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, origin.signal_mask)
    _die_with(origin.parent)
    stacks = open(stack_file, "w")  # noqa: SIM115 - faulthandler needs it to the end
    faulthandler.enable(file=stacks)
    faulthandler.register(STACK_SIGNAL, file=stacks, all_threads=True)
    # The parent's objects are the parent's to finalise; freezing also keeps their pages shared.
    gc.freeze()
    _write_whole_lines()
    for name in TORCHRUN:
        os.environ.pop(name, None)  # they describe the parent, not this rank
    use_loopback()


def use_loopback() -> None:
    """Keep gloo on this machine: it would otherwise ask for the address of the host's name."""
    if sys.platform == "linux" and "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _write_whole_lines() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, write_through=False)


def _die_with(parent: int) -> None:
    """End this process when ``parent`` ends, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before we asked
            os._exit(1)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _frames(error: BaseException) -> TracebackType | None:
    """The traceback of ``error`` without the frames of this file that lead to the function."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    return frames or error.__traceback__


def _lost_a_peer(error: BaseException) -> bool:
    """Whether ``error`` comes from a connection to a rank that is gone, at any remove."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if isinstance(link, dist.DistStoreError | dist.DistNetworkError):
            return True
        if isinstance(link, RuntimeError) and _LOST_PEER.search(str(link)):
            return True
        link = link.__cause__ or link.__context__
    return False
