"""The world of forked ranks: one process group at a time, each in a room of its own of one store.

A gloo group has a thread that wakes a hundred times a second, and torch frees no group before the
world goes. Whatever makes many layouts one after the other leaves the world between them.
"""

import gc
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore, Store

from fivefold.parallel_core._compat import forget_meshes
from fivefold.parallel_core.background import wait_for_all
from fivefold.parallel_core.errors import ParallelError


@dataclass(slots=True, kw_only=True)
class _World:
    """What a rank needs to know to join again.

    Attributes:
        rank: of this process.
        world_size: number of ranks.
        timeout: after which a collective gives up.
        store: where the ranks of all worlds of a launch meet.
        number: of the world that the rank is in, from 0.
    """

    rank: int
    world_size: int
    timeout: timedelta
    store: Store
    number: int = 0

    def join(self) -> None:
        # Keys of an earlier world would tell addresses where nobody listens any more.
        dist.init_process_group(
            "gloo",
            store=PrefixStore(f"world-{self.number}", self.store),
            rank=self.rank,
            world_size=self.world_size,
            timeout=self.timeout,
        )

    def meet(self) -> None:
        """Wait for all ranks without a message whose end could be taken for a crash."""
        met = f"met-{self.number}"
        if self.store.add(f"{met}-count", 1) == self.world_size:
            self.store.set(met, "all")
        self.store.wait([met], self.timeout)


_world: _World | None = None


def join(rank: int, world_size: int, timeout: timedelta, rendezvous: Path) -> None:
    """Join the ranks of a launch in their first world.

    Args:
        rank: of this process.
        world_size: number of ranks.
        timeout: after which a collective gives up.
        rendezvous: a file that all ranks can write, in a folder that goes after the launch.
    """
    global _world
    store = FileStore(str(rendezvous), world_size)
    _world = _World(rank=rank, world_size=world_size, timeout=timeout, store=store)
    _world.join()


def rejoin() -> None:
    """Leave the world and join the same ranks in a new one; all ranks of a `launch` together.

    All groups end, and with them their threads; topologies and models that were made on them can
    send nothing any more. Work in the background is waited for first.

    Raises:
        ParallelError: this process is no rank of a `launch` that joined its ranks.
    """
    if _world is None or not dist.is_initialized():
        raise ParallelError(
            "rejoin() is for the ranks of launch(..., init=True), which know where to meet again; "
            "this process is none of them"
        )
    wait_for_all()
    _world.meet()
    dist.destroy_process_group()
    forget_meshes()
    gc.collect()  # modules hold their groups in circles, and a group lives while it is held
    _world.number += 1
    _world.join()
