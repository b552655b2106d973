"""What torch calls differently from release to release, or does not do by itself."""

import importlib
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

# torch 2.13 warns on the names that 2.11 and 2.12 know; looking them up by name keeps both quiet.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_CLEAR = "_clear_sharding_prop_cache"


def all_gather_single(
    output: Tensor, input: Tensor, group: ProcessGroup | None = None, async_op: bool = False
) -> Work | None:
    """Write every rank's ``input`` into ``output``, in rank order along dim 0.

    Args:
        output: contiguous, (n * d0, ...) or (n, d0, ...) for n ranks and ``input`` (d0, ...).
        input: contiguous, of one shape on all ranks.
        group: the ranks that take part; None means all.
        async_op: return at once; ``output`` is ready after ``wait()`` on what is returned.

    Returns:
        The work to wait for if ``async_op``, otherwise None.
    """
    work: Work | None = _all_gather(output, input, group=group, async_op=async_op)
    return work


def reduce_scatter_single(
    output: Tensor, input: Tensor, group: ProcessGroup | None = None, async_op: bool = False
) -> Work | None:
    """Sum ``input`` over the ranks and write this rank's share of dim 0 into ``output``.

    Args:
        output: contiguous, (d0, ...).
        input: contiguous, (n * d0, ...) or (n, d0, ...) for n ranks, of one shape on all ranks.
        group: the ranks that take part; None means all.
        async_op: return at once; ``output`` is ready after ``wait()`` on what is returned.

    Returns:
        The work to wait for if ``async_op``, otherwise None.
    """
    work: Work | None = _reduce_scatter(output, input, group=group, async_op=async_op)
    return work


def world_timeout() -> timedelta:
    """After how long collectives over all ranks give up, as the job was started with."""
    world = dist.group.WORLD
    if world is None:
        raise RuntimeError("this process is in no process group")
    device = torch.device("cuda" if dist.get_backend(world) == "nccl" else "cpu")
    found: timedelta = world._get_backend(device).options._timeout
    return found


def new_group(ranks: Sequence[int], backend: str | None = None) -> ProcessGroup:
    """A group of some ranks, made by these alone, that gives up when the world's would.

    torch's own waits for half an hour, whatever the job was started with.

    Args:
        ranks: the members, this rank among them; every one of them calls this.
        backend: None is the world's.
    """
    group: ProcessGroup = dist.new_group(
        list(ranks), timeout=world_timeout(), backend=backend, use_local_synchronization=True
    )
    return group


def forget_meshes() -> None:
    """Let DTensor's memory of layouts go, which keeps their meshes' groups alive."""
    # A tool for finding mistakes, and not there under this name in every release.
    clear = getattr(importlib.import_module("torch.distributed.tensor.debug"), _CLEAR, None)
    if clear is not None:
        clear()
