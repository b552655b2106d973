"""Whether a forward pass is a repetition for the sake of backward, and whether to have one."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

# Not a ContextVar: backward runs in threads of autograd's own, each of which sees its own value.
_state = threading.local()
# Read in the thread that runs the model; a repetition does not ask again.
_requested: ContextVar[bool] = ContextVar("recompute_requested", default=False)


def is_recomputing() -> bool:
    """True inside a forward pass that backward repeats; counters must not count it again."""
    return getattr(_state, "depth", 0) > 0


def recomputation() -> AbstractContextManager[None]:
    """Marks what runs inside as a repetition; the manager may be entered again."""
    return _Repetition()


class _Repetition(AbstractContextManager[None]):
    # Not a generator, which runs once: a backward in two parts, first for the inputs and then for
    # the weights, repeats a region twice with the manager that its forward made.
    def __enter__(self) -> None:
        _state.depth = getattr(_state, "depth", 0) + 1

    def __exit__(self, *_: object) -> None:
        _state.depth -= 1


def is_requested() -> bool:
    """Whether regions that are recomputed on request are recomputed in the call that runs now."""
    return _requested.get()


@contextmanager
def request_recomputation(on: bool = True) -> Iterator[None]:
    """Ask the forward pass inside to recompute its regions on request (``regions.recompute``)."""
    token = _requested.set(on)
    try:
        yield
    finally:
        _requested.reset(token)
