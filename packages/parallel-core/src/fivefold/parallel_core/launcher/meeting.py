"""Where the ranks that torchrun started meet: a part of its store that no earlier try has used.

When a rank dies torchrun starts all of them again, on the same store. What the ranks of the try
before wrote there is still there: addresses where nobody listens any longer. Nor do ranks on
several machines have the same number of restarts, so it cannot serve as a name for the try.
"""

import json
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

_POLL = 0.02  # seconds between looks


def meet(timeout: timedelta) -> tuple[Store, int, int]:
    """Meet the ranks of this try, as torchrun's environment says.

    Args:
        timeout: after which to give up.

    Returns:
        A store that only they use, this rank, and the number of ranks.

    Raises:
        RuntimeError: not all ranks have come in time; torch's own where there is no store.
    """
    rendezvous: Callable[..., Iterator[Any]] = dist.rendezvous  # type: ignore[attr-defined]
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    return PrefixStore(agree(store, rank, world_size, timeout), store), rank, world_size


def agree(store: Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name that the ranks that are here now share, and no others.

    Every rank says by a word of its own that it is here. Rank 0 repeats all of these words until
    every rank has found its own among them: those of ranks that are gone are never answered.

    Args:
        store: of all tries.
        rank: of this process.
        world_size: number of ranks.
        timeout: after which to give up.

    Returns:
        The word of rank 0.

    Raises:
        RuntimeError: not all ranks have come in time.
    """
    word, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    store.set(f"here-{rank}", word)
    while time.monotonic() < deadline:
        heard = _call(store, world_size) if rank == 0 else json.loads(store.get("call"))
        if rank != 0 and heard[rank : rank + 1] == [word]:
            store.set(f"heard-{heard[0]}-{rank}", "")
            return str(heard[0])
        if rank == 0 and store.check([f"heard-{word}-{other}" for other in range(1, world_size)]):
            return word
        time.sleep(_POLL)
    raise RuntimeError(f"rank {rank} of {world_size} has not met the others in {timeout}")


def _call(store: Store, world_size: int) -> list[str]:
    """Repeat, as rank 0, what all ranks have said last."""
    words = [store.get(f"here-{rank}").decode() for rank in range(world_size)]
    store.set("call", json.dumps(words))
    return words
