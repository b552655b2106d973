"""Small plain data from rank to rank, and what one rank does while the others wait."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist


class Together:
    """The ranks of a group as they agree on something; one process by itself agrees at once.

    Args:
        group: all ranks of the job; None is the group of the world, where there is one.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group
        self.is_alone = not dist.is_initialized()
        self.rank = 0 if self.is_alone else dist.get_rank()
        self.world_size = 1 if self.is_alone else dist.get_world_size()

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, on every rank, when all have come here."""
        if self.is_alone:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if self.is_alone:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def on_first(self, act: Callable[[], None]) -> None:
        """Let rank 0 act while the others wait.

        Raises:
            OSError: the system's error there, on every rank.
        """
        failed = self.from_first(_error_of(act) if self.rank == 0 else None)
        if failed is not None:
            raise failed

    def on_each(self, act: Callable[[], Any]) -> list[Any]:
        """Let every rank act; what each returned, on every rank.

        Raises:
            OSError: the system's error on the first rank that had one, on every rank.
        """
        made: list[Any] = []
        failed = _error_of(lambda: made.append(act()))
        found = self.gather((failed, made))
        for error, _ in found:
            if error is not None:
                raise error
        return [value for _, (value,) in found]


def _error_of(act: Callable[[], None]) -> OSError | None:
    try:
        act()
    except OSError as error:
        return error
    return None
