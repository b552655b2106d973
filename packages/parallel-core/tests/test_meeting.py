"""Ranks of a try that meet on a store where those of earlier tries have left their traces."""

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from fivefold.parallel_core.launcher.meeting import agree

SOON, LONG = timedelta(seconds=0.3), timedelta(seconds=60)


def one_try(store: dist.HashStore, ranks: list[int], timeout: timedelta) -> dict[int, str]:
    """What the ranks of three that have come agree on, or why they have not."""
    found: dict[int, str] = {}

    def come(rank: int) -> None:
        try:
            found[rank] = agree(store, rank, 3, timeout)
        except RuntimeError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("died", [[], [0], [1], [0, 2]])
def test_a_try_never_meets_the_one_before(died: list[int]) -> None:
    store = dist.HashStore()
    store.set_timeout(SOON)
    before = one_try(store, [rank for rank in range(3) if rank not in died], SOON)
    store.set_timeout(LONG)
    for _ in range(3):
        words = one_try(store, [2, 1, 0], LONG)
        assert len(set(words.values())) == 1 and len(words) == 3
        assert words[0] not in before.values()
        before |= {len(before) + 3: words[0]}


def test_ranks_that_are_left_alone_say_so() -> None:
    store = dist.HashStore()
    store.set_timeout(LONG)
    one_try(store, [0, 1, 2], LONG)
    found = one_try(store, [0, 2], SOON)
    assert found[0].startswith("rank 0 of 3 has not met the others in 0:00:00.3")
    # Rank 2 and the first have met; it learns from their first message that rank 1 is missing.
    assert len(found[2]) == 32
