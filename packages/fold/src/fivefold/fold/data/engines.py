"""Who reads structures: processes of this machine, or an engine that has many machines."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import as_completed as completed
from multiprocessing import get_context
from typing import Any, Literal

from fivefold.fold.errors import FoldDataError

Engine = Literal["processes", "dask", "ray"]
ENGINES: tuple[Engine, ...] = ("processes", "dask", "ray")


def run_jobs(
    work: Callable[[Any], None],
    jobs: Sequence[Any],
    *,
    engine: Engine = "processes",
    num_workers: int = 1,
    address: str | None = None,
) -> Iterator[None]:
    """Run ``work`` on every job, in any order; yields as often as one is done.

    Args:
        work: importable where the engine's workers are; it writes to storage that they share.
        jobs: what it is given.
        engine: "processes" of this machine; or Dask or Ray, which must be installed.
        num_workers: processes of this machine, or of an engine that is started on it.
        address: of an engine's scheduler. None is the Dask client or the Ray cluster that this
            process is connected to, or else one that is started on this machine.

    Raises:
        FoldDataError: no such engine, or an address that "processes" have no use for.
        ImportError: the engine is not installed.
    """
    if engine not in ENGINES:
        raise FoldDataError(f"there is no engine {engine!r}; there are {', '.join(ENGINES)}")
    if engine == "processes" and address is not None:
        raise FoldDataError(f"processes of this machine have no scheduler at {address}; choose one "
                            "of dask, ray")  # fmt: skip
    run = {"dask": _on_dask, "ray": _on_ray}.get(engine)
    return run(work, jobs, num_workers, address) if run else _here(work, jobs, num_workers)


def _here(work: Callable[[Any], None], jobs: Sequence[Any], num_workers: int) -> Iterator[None]:
    if num_workers <= 1 or len(jobs) <= 1:
        for job in jobs:
            work(job)
            yield
        return
    # A fork of a process that has threads may hang.
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        for future in completed([pool.submit(work, job) for job in jobs]):
            future.result()
            yield


def _on_dask(
    work: Callable[[Any], None], jobs: Sequence[Any], num_workers: int, address: str | None
) -> Iterator[None]:
    try:
        from distributed import Client, as_completed, default_client
    except ImportError as error:
        raise ImportError('Dask is missing: pip install "fivefold-fold[dask]"') from error
    own = None
    try:
        if address is not None:
            client = own = Client(address)
        else:
            try:
                client = default_client()
            except ValueError:
                # One thread each: reading is Python's work, which threads would take turns at.
                client = own = Client(
                    n_workers=num_workers, threads_per_worker=1, dashboard_address=None
                )
        for future in as_completed(client.map(work, jobs, pure=False)):
            future.result()
            yield
    finally:
        if own is not None:
            own.close()


def _on_ray(
    work: Callable[[Any], None], jobs: Sequence[Any], num_workers: int, address: str | None
) -> Iterator[None]:
    try:
        import ray
    except ImportError as error:
        raise ImportError('Ray is missing: pip install "fivefold-fold[ray]"') from error
    own = not ray.is_initialized()
    if own:
        ray.init(address=address) if address else ray.init(num_cpus=num_workers)
    try:
        remote = ray.remote(work)
        waiting = [remote.remote(job) for job in jobs]
        while waiting:
            ready, waiting = ray.wait(waiting)
            ray.get(ready)
            yield from (None for _ in ready)
    finally:
        if own:
            ray.shutdown()
