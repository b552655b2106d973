"""Compile many kernels at once, in processes of their own."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed

from fivefold.kernels.errors import CompileError
from fivefold.kernels.offline.builds import Build
from fivefold.kernels.offline.compile import Compiled, compile_build

Job = tuple[Build, str]


def compile_all(
    jobs: Sequence[Job], processes: int | None, progress: Callable[[int, int], None]
) -> Iterator[tuple[int, Compiled | CompileError]]:
    """Compile kernels for targets; yields position and result as they come.

    Args:
        jobs: kernels and targets.
        processes: how many to use; the default is one a core. 1 compiles in this one.
        progress: called with how many are done and how many there are.
    """
    processes = min(processes or _cores(), len(jobs))
    if processes <= 1:
        for index, job in enumerate(jobs):
            yield index, _compile(job)
            progress(index + 1, len(jobs))
        return
    with ProcessPoolExecutor(processes, mp_context=_context()) as pool:
        futures: dict[Future[Compiled | CompileError], int] = {
            pool.submit(_compile, job): index for index, job in enumerate(jobs)
        }
        try:
            for done, future in enumerate(as_completed(futures), 1):
                yield futures[future], future.result()
                progress(done, len(jobs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def show_progress(done: int, total: int) -> None:
    """One line on stderr that counts, where somebody looks."""
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        sys.stderr.write(f"\rcompiled {done} of {total}{end}")
        sys.stderr.flush()


def _compile(job: Job) -> Compiled | CompileError:
    try:
        return compile_build(*job)
    except CompileError as error:
        # Without its cause, which may be of a class that does not go from process to process.
        return type(error)(str(error))


def _context() -> multiprocessing.context.BaseContext:
    """Processes that begin with Triton and torch imported once, and without this one's threads."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["triton", "fivefold.kernels.triton_parts", __name__])
    return context


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
