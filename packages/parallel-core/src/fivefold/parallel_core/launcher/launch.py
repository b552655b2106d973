"""Start the ranks of a job: forked on this machine, or joined to the ones torchrun started."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, TypeVarTuple

import torch
import torch.distributed as dist

from fivefold.parallel_core.background import wait_for_all
from fivefold.parallel_core.errors import ConfigError, ParallelError
from fivefold.parallel_core.launcher.meeting import meet
from fivefold.parallel_core.launcher.rank import TORCHRUN, Job, identity, use_loopback

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_GRACE = 1.0  # seconds that a rank has to end after SIGTERM


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
    # Only now: these modules need what only a platform with fork has.
    from fivefold.parallel_core.launcher.forked import forked_ranks
    from fivefold.parallel_core.launcher.supervise import Supervisor, counted_signals

    job = Job(
        world_size=world_size,
        threads=threads_per_rank,
        collective_timeout=collective_timeout,
        init=init,
    )
    with counted_signals() as signals, forked_ranks(job, fn, args, _GRACE) as ranks:
        supervisor = Supervisor(ranks, signals, timeout, on_interrupt)
        supervisor.wait_for_results()
        supervisor.wait_for_ends()
        return [rank.result() for rank in ranks]


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


def under_torchrun() -> bool:
    """Whether this process was started as a rank of a job by torchrun or in the same way."""
    return all(name in os.environ for name in TORCHRUN)


def place() -> tuple[int, int]:
    """This process's rank and the number of ranks, as torchrun says, before they have met.

    Raises:
        ConfigError: torchrun has not started this process.
    """
    if not under_torchrun():
        raise ConfigError(f"{', '.join(TORCHRUN)} are not set: torchrun has not started this rank")
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


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
        present = [name for name in TORCHRUN if name in os.environ]
        if not present:
            return identity() or (0, 1)
        if not under_torchrun():
            missing = [name for name in TORCHRUN if name not in present]
            raise ConfigError(f"{present} set but not {missing}: torchrun sets all or none")
        _join_torchrun(device_type, timedelta(seconds=timeout))
    return dist.get_rank(), dist.get_world_size()


def disconnect() -> None:
    """Leave the process group, if this process is in one, when what uses it has ended."""
    wait_for_all()
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
    store, rank, world_size = meet(timeout)
    dist.init_process_group(
        store=store, rank=rank, world_size=world_size, timeout=timeout, **options
    )


def _cuda_device(local_rank: int) -> torch.device:
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"LOCAL_RANK={local_rank}, but this machine has {count} GPUs: start at most {count}"
            " ranks per machine, or ask for device_type='cpu'"
        )
    return torch.device("cuda", local_rank)
