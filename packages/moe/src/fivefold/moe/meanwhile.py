"""Work that waits for a gap: what a layer can do while its tokens are on their way."""

from collections.abc import Callable

from torch import Tensor


class Meanwhile:
    """A tensor that may be computed early, at the latest when it is asked for.

    Args:
        compute: makes the tensor; runs once.
    """

    def __init__(self, compute: Callable[[], Tensor]):
        self._compute = compute
        self._value: Tensor | None = None

    def run(self) -> None:
        """Compute it now, unless it is there."""
        if self._value is None:
            self._value = self._compute()

    @property
    def value(self) -> Tensor:
        """The tensor."""
        if self._value is None:
            self._value = self._compute()
        return self._value
