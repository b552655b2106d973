"""Being asked to end: SIGTERM and Ctrl-C become a wish that the training loop looks at."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SAME_STROKE = 2.0  # seconds in which a second Ctrl-C is taken for the first one


class StopRequest:
    """Whether this process was asked to end at the next good moment.

    Attributes:
        asked: so it was, since ``heard`` was entered.
    """

    def __init__(self) -> None:
        self.asked = False
        self._time = -math.inf

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Take signals for a wish within the block; only a main thread can be asked.

        A second Ctrl-C interrupts at once. A second SIGTERM does nothing: what sent the first one
        waits for the checkpoint, or kills.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # Forked ranks ignore SIGINT: there the launcher counts it and sends SIGTERM.
        by_hand = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        numbers = [signal.SIGTERM, signal.SIGINT] if by_hand else [signal.SIGTERM]
        earlier = {number: signal.signal(number, self._ask) for number in numbers}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)
            self.asked = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        # Launchers pass on the Ctrl-C that the terminal has sent to this process already.
        now = time.monotonic()
        if self.asked and number == signal.SIGINT and now - self._time > _SAME_STROKE:
            raise KeyboardInterrupt
        self.asked, self._time = True, now
