"""Work that all ranks do at the same time, and what each says of it, within a bounded time.

What is examined may hang, so it runs in a thread of its own. What the ranks say of it travels
through the store by which they have met, not through the collectives that are examined.
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from fivefold.parallel_core.errors import FollowUpError, RankError

SLACK = 5.0
"""Seconds that a rank may be late with its verdict before it is taken for dead."""

_POLL = 0.2  # seconds between looks at how the others of the group fare
_GRACE = 1.0  # seconds that a rank has to end once another of its group has failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a rank says of one check.

    Attributes:
        status: "ok", "wrong" (another result than it must be), "error" (an exception), "hung" (it
            did not end) or "lost" (it did not end after another rank of its group had failed).
        detail: what was wrong, raised, or where it hangs; empty if ok.
        seconds: of each timed call.
        sent: bytes that this rank sends in one call, by the formulas of the ledger.
    """

    status: str
    detail: str = ""
    seconds: tuple[float, ...] = ()
    sent: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a round went.

    Attributes:
        verdicts: of all ranks, on rank 0; elsewhere empty. None for a rank that gave none.
        in_step: whether the groups that were used can be used on.
        stop: whether no further round can be.
    """

    verdicts: tuple[Verdict | None, ...]
    in_step: bool
    stop: bool


class Rounds:
    """Rounds of work, one after the other; every rank runs the same ones.

    Attributes:
        rank: this rank.
        world_size: number of ranks.
        work_store: for the work's own use.

    Args:
        timeout: seconds that a round may take.
        device: where the work's tensors live.
    """

    def __init__(self, timeout: float, device: torch.device):
        # Clones, because a thread that waits for a key keeps the others off its store.
        store: Any = PrefixStore("fivefold-doctor", _get_default_store())
        self.work_store: Store = store.clone()
        self._store: Store = store.clone()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._timeout = timeout
        self._device = device
        self._count = 0

    def run(self, work: Callable[[], Verdict], group: tuple[int, ...]) -> Outcome:
        """Do ``work`` on every rank.

        Args:
            work: uses collectives of ``group`` only.
            group: the ranks that this rank works with.

        Raises:
            RankError: rank 0 is gone, or the store.
        """
        try:
            return self._run(work, group)
        except RankError:
            raise
        except RuntimeError as error:  # the stores have no closer name for it
            reason = str(error).strip().splitlines()[0]
            raise FollowUpError(f"the store by which the ranks met is gone: {reason}") from error

    def _run(self, work: Callable[[], Verdict], group: tuple[int, ...]) -> Outcome:
        self._count += 1
        start = time.monotonic()
        verdict = self._do(work, f"{self._count}/failed/{group[0]}")
        self._store.set(self._key(self.rank), json.dumps(asdict(verdict)))
        if self.rank == 0:
            outcome = self._judge(start + self._timeout + SLACK)
            self._store.set(self._key("outcome"), json.dumps([outcome.in_step, outcome.stop]))
            return outcome
        # Longer than rank 0 waits for the others before it says how they did.
        if not self._wait(["outcome"], self._timeout + 2 * SLACK):
            seconds = self._timeout + 2 * SLACK
            raise FollowUpError(f"rank 0 gave no answer within {seconds:g} s")
        in_step, stop = json.loads(self._store.get(self._key("outcome")))
        return Outcome(verdicts=(), in_step=in_step, stop=stop)

    def _do(self, work: Callable[[], Verdict], failed: str) -> Verdict:
        """This rank's verdict; ``failed`` is set by whom of its group an exception stops."""
        found: list[Verdict] = []
        thread = threading.Thread(target=lambda: found.append(self._guard(work)), daemon=True)
        thread.start()
        limit, status = time.monotonic() + self._timeout, "hung"
        thread.join(min(_POLL, self._timeout))
        while thread.is_alive() and (left := limit - time.monotonic()) > 0:
            if status == "hung" and self._store.check([failed]):
                limit, status = min(limit, time.monotonic() + _GRACE), "lost"
            thread.join(min(_POLL, left))
        if not found:
            return Verdict(status=status, detail=_place(thread))
        if found[0].status == "error":
            self._store.set(failed, "1")
        return found[0]

    def _guard(self, work: Callable[[], Verdict]) -> Verdict:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # a thread starts with the first one
            return work()
        except BaseException as error:
            lines = str(error).strip().splitlines() or [""]
            return Verdict(status="error", detail=f"{type(error).__name__}: {lines[0]}")

    def _judge(self, limit: float) -> Outcome:
        """On rank 0: hear all ranks, until ``limit``, and decide how to go on."""
        everyone = range(self.world_size)
        self._wait(everyone, limit - time.monotonic())
        verdicts = tuple(self._verdict(rank) for rank in everyone)
        statuses = {"silent" if verdict is None else verdict.status for verdict in verdicts}
        out_of_step = not statuses.isdisjoint({"hung", "lost", "silent"})
        # What every rank refuses, such as a dtype that the backend lacks, leaves them in step.
        out_of_step |= "error" in statuses and len(statuses) > 1
        # A kernel that never ends keeps everything else off a GPU.
        stuck = self._device.type == "cuda" and not statuses.isdisjoint({"hung", "lost"})
        return Outcome(
            verdicts=verdicts, in_step=not out_of_step, stop=stuck or "silent" in statuses
        )

    def _verdict(self, rank: int) -> Verdict | None:
        key = self._key(rank)
        if not self._store.check([key]):
            return None
        said = json.loads(self._store.get(key))
        return Verdict(**said | {"seconds": tuple(said["seconds"])})

    def farewell(self, status: int) -> int:
        """Wait until rank 0 has nothing left to say: torchrun ends all ranks with the first one.

        Args:
            status: with which this rank would exit.

        Returns:
            The exit status of rank 0, or ``status`` where it does not tell.
        """
        with suppress(RuntimeError):  # the store may be gone with a rank
            if self.rank == 0:
                self._store.set("status", str(status))
                # The store may be in this process.
                self._wait_for([f"left/{rank}" for rank in range(1, self.world_size)], _GRACE)
            elif self._wait_for(["status"], 2 * SLACK):
                status = int(self._store.get("status"))
                self._store.set(f"left/{self.rank}", "1")
        return status

    def _wait(self, names: Iterable[int | str], seconds: float) -> bool:
        return self._wait_for([self._key(name) for name in names], seconds)

    def _wait_for(self, keys: list[str], seconds: float) -> bool:
        try:
            self._store.wait(keys, timedelta(seconds=seconds))
        except RuntimeError:
            return False
        return True

    def _key(self, name: int | str) -> str:
        return f"{self._count}/{name}"


def _place(thread: threading.Thread) -> str:
    """Where a thread is, as ``function (file:line)``."""
    frame = sys._current_frames().get(thread.ident or 0)
    if frame is None:
        return ""
    code = frame.f_code
    return f"{code.co_name} ({Path(code.co_filename).name}:{frame.f_lineno})"
