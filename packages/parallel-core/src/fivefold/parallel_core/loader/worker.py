"""One worker: a forked process that makes one sample at a time and dies with its parent."""

import ctypes
import multiprocessing
import os
import signal
import sys
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch

from fivefold.parallel_core.loader.messages import receive, send

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class Dataset(Protocol):
    """Anything that gives a sample for a key."""

    def __getitem__(self, key: Any, /) -> Any:
        """The sample."""
        ...


@dataclass(frozen=True, slots=True)
class Failed:
    """An error in a worker.

    Attributes:
        what: its kind and message.
        traceback: of the worker.
    """

    what: str
    traceback: str


class Worker:
    """The parent's view of one process.

    Attributes:
        pipe: to it and from it.
        ordinal: of the sample that it makes; None while it has none.

    Args:
        dataset: to make samples of.
        seed: of the process's global random numbers.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.pipe, theirs = multiprocessing.Pipe()
        self.ordinal: int | None = None
        self.process = multiprocessing.get_context("fork").Process(
            target=_work, args=(dataset, theirs, os.getpid(), seed), daemon=True
        )
        try:
            self.process.start()
        finally:
            theirs.close()

    def begin(self, ordinal: int, key: Any) -> None:
        """Let it make a sample; one that is dead is found out when it is listened to."""
        self.ordinal = ordinal
        try:
            send(self.pipe, key)
        except OSError:
            self.process.kill()

    def result(self) -> Any:
        """What it made, or a ``Failed``.

        Raises:
            EOFError, OSError: it is dead.
        """
        return receive(self.pipe)

    def end(self) -> str:
        """End it, if it has not ended; how it had."""
        code = self.process.exitcode
        self.process.kill()
        self.process.join()
        self.pipe.close()
        code = self.process.exitcode if code is None else code
        return f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"


def _work(dataset: Dataset, pipe: Connection, parent: int, seed: int) -> None:
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    while True:
        try:
            key = receive(pipe)
        except (EOFError, OSError):
            return
        _answer(pipe, dataset, key)


def _answer(pipe: Connection, dataset: Dataset, key: Any) -> None:
    try:
        send(pipe, (dataset[key],))
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        send(pipe, Failed(what, traceback.format_exc()))


def _die_with(parent: int) -> None:
    """End with the thread that forked us, and so with its process, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before we asked
        os._exit(1)
