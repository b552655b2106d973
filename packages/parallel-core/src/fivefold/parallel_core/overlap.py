"""Reducing gradients while backward still runs, in one order on all ranks."""

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class Overlap(Generic[T]):
    """Starts the reductions of buckets in a fixed order, each as soon as it may be.

    A bucket may start when all of its gradients are there and the one before has started, so that
    every rank starts them in the same order, also where a rank has no gradient for some parameter.

    Args:
        buckets: names of the parameters of each, in the order of their reductions.
        start: starts the reduction of some names.
    """

    def __init__(self, buckets: Sequence[Sequence[str]], start: Callable[[Sequence[str]], T]):
        self._buckets, self._start = buckets, start
        self._missing: list[set[str]] = []
        self._started: list[T] = []

    def arm(self) -> None:
        """From now on gradients that arrive are a step's last."""
        self._missing = [set(bucket) for bucket in self._buckets]
        self._started = []

    def arrived(self, name: str) -> None:
        """The gradient of a parameter is there."""
        if not self._missing:
            return
        for missing in self._missing:
            missing.discard(name)
        while len(self._started) < len(self._missing) and not self._missing[len(self._started)]:
            self._started.append(self._start(self._buckets[len(self._started)]))

    def finish(self) -> Iterator[T]:
        """What has been started, and then the others, each started when it is asked for."""
        started, self._started, self._missing = self._started, [], []
        yield from started
        for bucket in self._buckets[len(started) :]:
            yield self._start(bucket)
