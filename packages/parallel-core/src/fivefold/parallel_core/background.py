"""Work beside the training loop, one piece at a time, whose errors are not lost."""

import threading
import weakref
from collections.abc import Callable

_live: "weakref.WeakSet[Background]" = weakref.WeakSet()


class Background:
    """A thread that does one piece of work at a time.

    A process does not end before the work has: neither at its interpreter's end, nor, where it
    leaves its process group by ``launcher.disconnect`` or is a rank of ``launch``, before that.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str):
        self._name = name
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        _live.add(self)

    def start(self, work: Callable[[], object]) -> None:
        """Begin ``work``; waits for what is under way first, and raises its error."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(work,), name=self._name)
        self._thread.start()

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error

    @property
    def is_busy(self) -> bool:
        """Whether work is under way."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        """Whether ``wait`` would raise at once."""
        return self._error is not None

    def wait(self) -> None:
        """Return when nothing is under way; raise, once, the error that ended the last work."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error


def wait_for_all() -> None:
    """Wait for all work of this process; raise the first error."""
    for background in list(_live):
        background.wait()
