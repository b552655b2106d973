"""The thread that keeps workers busy, replaces those that die, and holds what is ready."""

import multiprocessing
import threading
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

from fivefold.parallel_core.errors import LoaderError
from fivefold.parallel_core.loader.order import Order
from fivefold.parallel_core.loader.worker import Dataset, Failed, Worker

_LOOK_AFTER = 1.0
"""Seconds after which dead workers are looked for whose pipe somebody else's child keeps open."""


class Supervisor:
    """See ``ReadyFirstLoader``, whose arguments these are."""

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        *,
        key_of: Callable[[int], Any],
        name_of: Callable[[int], str],
        num_workers: int,
        most_deaths: int,
        seed: int,
    ):
        self._dataset, self._order, self._seed = dataset, order, seed
        self._key_of, self._name_of = key_of, name_of
        self._num_workers, self._most_deaths = num_workers, most_deaths
        self._workers: list[Worker] = []
        self._num_started = 0
        self._deaths: Counter[int] = Counter()
        self._values: dict[int, Any] = {}
        self._error: LoaderError | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._listen, self._wake = multiprocessing.Pipe(duplex=False)
        self._thread: threading.Thread | None = None

    def take(self) -> tuple[int, Any] | None:
        """The next sample; waits for one; None after the last.

        Raises:
            LoaderError: a sample failed, or this was closed.
        """
        with self._changed:
            if self._order.is_over:
                return None
            self._start()
            while True:
                if self._error is not None:
                    raise self._error
                if self._closed:
                    raise LoaderError("the loader was closed; make another to go on")
                ordinal = self._order.deliver()
                if ordinal is not None:
                    self._wake.send_bytes(b"room")
                    return ordinal, self._values.pop(ordinal)
                self._changed.wait()

    def state_dict(self) -> dict[str, Any]:
        """Of the order."""
        with self._changed:
            return self._order.state_dict()

    def close(self) -> None:
        """End thread and workers."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._wake.send_bytes(b"end")
            self._thread.join()
        self._wake.close()
        self._listen.close()

    def _start(self) -> None:
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(target=self._run, name="samples", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        try:
            # Forked here: workers end with the thread that forked them.
            self._workers = [self._worker() for _ in range(self._num_workers)]
            while not self._closed and self._error is None:
                self._hand_out()
                self._hear()
        except BaseException as error:
            self._fail(LoaderError(f"the loader's own thread failed: {error!r}"), error)
        finally:
            for worker in self._workers:
                worker.end()

    def _worker(self) -> Worker:
        self._num_started += 1
        return Worker(self._dataset, self._seed + self._num_started)

    def _hand_out(self) -> None:
        for worker in self._workers:
            if worker.ordinal is None:
                with self._changed:
                    ordinal = self._order.begin()
                if ordinal is None:
                    return
                worker.begin(ordinal, self._key_of(ordinal))

    def _hear(self) -> None:
        """Wait until a worker or the consumer has something to say, and act on it."""
        by_pipe = {worker.pipe: worker for worker in self._workers}
        said = wait([self._listen, *by_pipe], timeout=_LOOK_AFTER)
        for pipe in said:
            if pipe is self._listen:
                while self._listen.poll():
                    self._listen.recv_bytes()
            else:
                self._take_from(by_pipe[pipe])  # type: ignore[index]  # no fd is in the list
        if not said:
            for worker in by_pipe.values():
                if not worker.process.is_alive():
                    self._replace(worker)

    def _take_from(self, worker: Worker) -> None:
        try:
            result = worker.result()
        except (EOFError, OSError):
            self._replace(worker)
            return
        ordinal, worker.ordinal = worker.ordinal, None
        if ordinal is None:
            raise LoaderError("a worker answered what it was not asked")
        if isinstance(result, Failed):
            self._fail(
                LoaderError(
                    f"sample {self._name_of(ordinal)} (number {ordinal}) cannot be made: "
                    f"{result.what}\nIn its worker:\n{result.traceback}"
                )
            )
            return
        with self._changed:
            self._order.done(ordinal)
            self._values[ordinal] = result[0]
            self._changed.notify_all()

    def _replace(self, worker: Worker) -> None:
        """Another worker in the place of one that is dead; its sample is made again."""
        ordinal, how = worker.ordinal, worker.end()
        self._workers.remove(worker)
        if ordinal is not None:
            self._deaths[ordinal] += 1
            if self._deaths[ordinal] >= self._most_deaths:
                self._fail(
                    LoaderError(
                        f"sample {self._name_of(ordinal)} (number {ordinal}): "
                        f"{self._deaths[ordinal]} workers died while they made it, the last of "
                        f"{how}; make it alone to see why, or look for a lack of memory"
                    )
                )
                return
            with self._changed:
                self._order.lost(ordinal)
        self._workers.append(self._worker())

    def _fail(self, error: LoaderError, cause: BaseException | None = None) -> None:
        with self._changed:
            error.__cause__ = cause
            self._error = self._error or error
            self._changed.notify_all()
