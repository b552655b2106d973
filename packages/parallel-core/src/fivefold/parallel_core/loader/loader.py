"""Samples from worker processes: the lowest ordinal that is ready comes first."""

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.loader.order import Order
from fivefold.parallel_core.loader.supervisor import Supervisor
from fivefold.parallel_core.loader.worker import Dataset


@dataclass(frozen=True, slots=True)
class Loaded:
    """A sample.

    Attributes:
        ordinal: its number in the stream.
        value: what the dataset gave.
    """

    ordinal: int
    value: Any


class ReadyFirstLoader:
    """Iterates over samples of a map-style dataset; a slow one comes late and holds up no other.

    Every sample comes once. A sample's place differs from its ordinal by at most ``window - 1``.
    A worker that dies is replaced and its sample made again; an error in a worker is raised at
    once, by the sample's name, and ends the loader. Workers are forked (Linux), have one sample
    each at a time, and end with the loader, however its process ends.

    Args:
        dataset: anything with ``dataset[key]``; workers have a copy of it as it is at the first
            ``next``. Samples must not depend on global random numbers: which worker makes which
            sample is not determined.
        num_samples: of the stream; None for no end.
        key_of: from an ordinal to the key; None for the ordinal itself.
        num_workers: processes.
        ahead: most samples being made or waiting; None for 4 a worker. It bounds memory.
        window: bound of the displacement; None for 64 a worker. Where a sample is slower than the
            others make ``window`` samples, they wait for it.
        in_order: deliver by ordinal, as torch's DataLoader does by default: then a run that goes
            on sees exactly what it would have seen.
        name_of: from an ordinal to what errors call the sample; None for its key.
        most_deaths: workers that may die over one sample before that is an error.
        seed: of workers' global random numbers, for datasets that use them all the same.

    Raises:
        ConfigError: a size below its least value.
    """

    def __init__(
        self,
        dataset: Dataset,
        num_samples: int | None,
        *,
        key_of: Callable[[int], Any] | None = None,
        num_workers: int,
        ahead: int | None = None,
        window: int | None = None,
        in_order: bool = False,
        name_of: Callable[[int], str] | None = None,
        most_deaths: int = 3,
        seed: int = 0,
    ):
        if num_workers < 1 or most_deaths < 1:
            raise ConfigError(
                f"num_workers={num_workers}, most_deaths={most_deaths}; both are at least 1"
            )
        self._order = Order(
            num_samples,
            ahead=4 * num_workers if ahead is None else ahead,
            window=64 * num_workers if window is None else window,
            in_order=in_order,
        )
        key_of = key_of or _same
        self._supervisor = Supervisor(
            dataset,
            self._order,
            key_of=key_of,
            name_of=name_of or (lambda ordinal: str(key_of(ordinal))),
            num_workers=num_workers,
            most_deaths=most_deaths,
            seed=seed,
        )
        # The thread knows the supervisor alone, so that a loader that is let go ends it.
        self._end = weakref.finalize(self, self._supervisor.close)
        self._lock = threading.Lock()
        self.waited = 0.0

    def __iter__(self) -> Iterator[Loaded]:
        return self

    def __next__(self) -> Loaded:
        """The next sample; waits for one, and counts the seconds in ``waited``.

        Raises:
            LoaderError: a worker failed, or the loader was closed.
        """
        start = time.perf_counter()
        with self._lock:
            found = self._supervisor.take()
        self.waited += time.perf_counter() - start
        if found is None:
            self.close()
            raise StopIteration
        return Loaded(*found)

    def take_waited(self) -> float:
        """Seconds that the consumer has waited since this was last asked, for metrics."""
        waited, self.waited = self.waited, 0.0
        return waited

    def state_dict(self) -> dict[str, Any]:
        """What has been delivered, as plain data; every other sample comes after resuming."""
        return self._supervisor.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after that; before the first sample is asked for.

        Raises:
            ConfigError: it is too late, or the state is of another stream.
        """
        self._order.load_state_dict(state)

    def close(self) -> None:
        """End the workers; again is no harm."""
        self._end()

    def __enter__(self) -> "ReadyFirstLoader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _same(ordinal: int) -> int:
    return ordinal
