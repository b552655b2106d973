"""Which sample is made next and which is delivered next: bookkeeping without any process.

Samples are numbered by ordinals 0, 1, 2, ... in the order in which they would be delivered if all
took equally long. The lowest ordinal that is ready is delivered first (the non-blocking pipeline of
ScaleFold, arXiv 2404.11068). None is begun that lies ``window`` or more beyond the lowest one that
has not been delivered, and therefore a sample's place in the stream differs from its ordinal by at
most ``window - 1``, either way.
"""

import heapq
from collections.abc import Mapping
from typing import Any

from fivefold.parallel_core.errors import ConfigError


class Order:
    """The state of one stream of samples.

    Attributes:
        lowest: the first ordinal that has not been delivered.

    Args:
        num_samples: how many there are; None for no end.
        ahead: most samples that are being made or wait to be delivered.
        window: bound of the displacement; see above.
        in_order: deliver strictly by ordinal, waiting for a slow sample.

    Raises:
        ConfigError: a size below its least value.
    """

    def __init__(self, num_samples: int | None, *, ahead: int, window: int, in_order: bool = False):
        if (num_samples is not None and num_samples < 0) or ahead < 1 or window < 1:
            raise ConfigError(
                f"num_samples={num_samples}, ahead={ahead}, window={window}; num_samples is at "
                "least 0 or None, ahead and window are at least 1"
            )
        self._num_samples, self._ahead, self._window = num_samples, ahead, window
        self._in_order = in_order
        self.lowest = self._next = 0
        self._delivered: set[int] = set()  # those beyond the lowest that has not been
        self._making: set[int] = set()
        self._again: list[int] = []
        self._ready: list[int] = []

    @property
    def is_over(self) -> bool:
        """Whether every sample has been delivered."""
        return self.lowest == self._num_samples

    def begin(self) -> int | None:
        """The ordinal to make next; None while there is no room, or none left."""
        if self._again:
            ordinal = heapq.heappop(self._again)
        else:
            # Of a stream that goes on, the lowest may have passed what was delivered before.
            self._next = max(self._next, self.lowest)
            while self._next in self._delivered:
                self._next += 1
            ordinal = self._next
            full = len(self._making) + len(self._ready) >= self._ahead
            if full or ordinal == self._num_samples or ordinal >= self.lowest + self._window:
                return None
            self._next += 1
        self._making.add(ordinal)
        return ordinal

    def lost(self, ordinal: int) -> None:
        """It was being made and is to be made again."""
        self._making.remove(ordinal)
        heapq.heappush(self._again, ordinal)

    def done(self, ordinal: int) -> None:
        """It was being made and is ready."""
        self._making.remove(ordinal)
        heapq.heappush(self._ready, ordinal)

    def deliver(self) -> int | None:
        """The ordinal to deliver next; None while it is not ready."""
        if not self._ready or (self._in_order and self._ready[0] != self.lowest):
            return None
        ordinal = heapq.heappop(self._ready)
        self._delivered.add(ordinal)
        while self.lowest in self._delivered:
            self._delivered.remove(self.lowest)
            self.lowest += 1
        return ordinal

    def state_dict(self) -> dict[str, Any]:
        """What has been delivered, as plain data."""
        return {"lowest": self.lowest, "delivered": sorted(self._delivered)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after what had been delivered; every other sample is still to come, once.

        Raises:
            ConfigError: this order has begun, or the state is not one of as many samples.
        """
        lowest, delivered = int(state["lowest"]), {int(each) for each in state["delivered"]}
        if self._next or self._making or self._ready:
            raise ConfigError("samples have been begun; give the state before the first is")
        most = max(delivered, default=lowest - 1)
        fits = self._num_samples is None or max(lowest, most + 1) <= self._num_samples
        if lowest < 0 or not fits or any(each <= lowest for each in delivered):
            raise ConfigError(
                f"a state with lowest={lowest} and {len(delivered)} delivered beyond it, the last "
                f"{most}, is none of {self._num_samples} samples"
            )
        self.lowest = self._next = lowest
        self._delivered = delivered
