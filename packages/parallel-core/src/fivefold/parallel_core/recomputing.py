"""Whether the forward pass that runs now is a repetition for the sake of backward."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Not a ContextVar: backward runs in threads of autograd's own, each of which sees its own value.
_state = threading.local()


def is_recomputing() -> bool:
    """True inside a forward pass that backward repeats; counters must not count it again."""
    return getattr(_state, "depth", 0) > 0


@contextmanager
def recomputation() -> Iterator[None]:
    """Marks what runs inside as a repetition."""
    _state.depth = getattr(_state, "depth", 0) + 1
    try:
        yield
    finally:
        _state.depth -= 1
