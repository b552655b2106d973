"""Who runs in a case: our backends, torch eager, torch.compile and other libraries."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from fivefold.kernels.backends import chosen_unasked
from fivefold.kernels.bench import machine
from fivefold.kernels.op import OPS, Op
from fivefold.kernels.samples import Inputs, OpSamples, Peer

# Backends by the qualified name of the registered op that they ran.
Choices = dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """A function that computes what an op does.

    Attributes:
        name: in the table.
        make: gives the function, which takes a sample's inputs.
        takes: whether it can run given inputs.
        libraries: top-level names that it needs.
    """

    name: str
    make: Callable[[], Callable[..., Any]]
    takes: Callable[[Inputs], bool] = lambda _: True
    libraries: tuple[str, ...] = ()


@contextmanager
def choices() -> Iterator[Choices]:
    """Note which backends run ops in the block, in any thread: autograd has its own."""
    made: Choices = {}
    choose = Op.choose

    def note(self: Op, *arguments: Any) -> str:
        made[self.qualified] = backend = choose(self, *arguments)
        return backend

    with patch.object(Op, "choose", note):
        yield made


def our_name(made: Choices) -> str:
    """``ours (triton)``, or ``ours (triton+reference)`` where hot paths differ."""
    return f"ours ({'+'.join(dict.fromkeys(made.values())) or 'no op'})"


def other_backends(op: OpSamples, made: Choices, device: str) -> list[Contender]:
    """The backends of an op that run on a device for good and were not chosen."""
    names = [backend for called in made for backend in OPS[called].backends]
    return [
        Contender(name=f"ours ({name})", make=partial(partial, op.function, backend=name))
        for name in dict.fromkeys(names)
        if chosen_unasked(name, device) and set(made.values()) != {name}
    ]


def others(op: OpSamples, *, compiled: bool) -> list[Contender]:
    """Torch, and the libraries that have the op."""
    found = [Contender(name="eager", make=lambda: op.eager)]
    if compiled:
        found.append(Contender(name="compile", make=lambda: torch.compile(op.eager, dynamic=False)))
    return found + [_of(peer) for peer in op.peers]


def libraries_of(op: OpSamples) -> set[str]:
    """Top-level names that the peers of an op import."""
    return {name for peer in op.peers for name in machine.imported_by(peer.function)}


def _of(peer: Peer) -> Contender:
    return Contender(
        name=peer.name,
        make=lambda: peer.function,
        takes=peer.takes,
        libraries=machine.imported_by(peer.function),
    )
