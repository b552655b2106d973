"""Random numbers of a job: equal where ranks compute the same, different where they do not.

Two streams on each rank, as in Megatron-LM (arXiv 1909.08053). torch's own generators are equal on
the ranks of "tp", which all compute the same where activations are replicated, and differ over the
data axes and over pipeline stages (``seed_ranks``). What works on split activations (heads, or the
tokens of sequence parallelism) runs in a stream of each rank's own (``own_stream``).

A stream starts from a number that all ranks draw alike from torch's CPU generator. So whatever
restores that generator, as recomputation and checkpoints do, restores the streams as well.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fivefold.parallel_core.topology import Axis, Topology


def _hashed(*numbers: int) -> int:
    """A seed that has nothing to do with those of other numbers."""
    text = "/".join(map(str, numbers))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())


def seed_ranks(topology: Topology, *seed: int) -> None:
    """Seed torch's generators: alike on the ranks of "tp", differently on all others.

    Args:
        topology: the ranks.
        seed: of the run, and what else makes a difference, such as the step.
    """
    torch.manual_seed(_hashed(*seed, *(topology.rank(axis) for axis in ("dp", "cp", "pp"))))


@contextmanager
def own_stream(axis: Axis, device: torch.device | None = None) -> Iterator[None]:
    """Draw other random numbers than the other ranks of ``axis`` inside; then go on as they do.

    All of them must enter it equally often.

    Args:
        axis: ranks whose generators are alike.
        device: the accelerator that numbers are drawn on; the default is the CPU.
    """
    if axis.size == 1:
        yield
        return
    seed = _hashed(int(torch.randint(1 << 62, (), device="cpu")), axis.rank)
    cuda = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for one in cuda:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(seed)
        yield


class OwnStream:
    """Marks a class whose ``forward`` and ``partial`` run in a stream of each rank's own."""

    random_axis: Axis


def in_own_stream(module: nn.Module, axis: Axis) -> nn.Module:
    """Let ``module`` draw other random numbers on each rank of ``axis``, in place."""
    kind = type(module)
    methods = [name for name in ("forward", "partial") if callable(getattr(kind, name, None))]
    body: dict[str, Any] = {name: _in_stream(getattr(kind, name)) for name in methods}
    module.__class__ = type(
        kind.__name__, (OwnStream, kind), {"__module__": kind.__module__} | body
    )
    module.random_axis = axis  # type: ignore[assignment]
    return module


def _in_stream(once: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(once)  # its arguments keep their names
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        devices = {x.device for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        with own_stream(self.random_axis, next(iter(devices), None)):
            return once(self, *args, **kwargs)

    return run


class Replay:
    """Random numbers drawn from now on, to be drawn again.

    Args:
        x: a tensor where they are drawn.
    """

    def __init__(self, x: Tensor):
        self._cpu = torch.get_rng_state()
        self._device = x.device if x.is_cuda else None
        self._cuda = torch.cuda.get_rng_state(x.device) if x.is_cuda else None

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw the same numbers inside; then go on as if nothing had been drawn."""
        with torch.random.fork_rng(devices=[self._device] if self._device is not None else []):
            torch.set_rng_state(self._cpu)
            if self._cuda is not None and self._device is not None:
                torch.cuda.set_rng_state(self._cuda, self._device)
            yield
