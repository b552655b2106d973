"""The one table of parameters: how each is laid over the ranks, and what follows from that.

Initialisation, gradient reduction, the global norm, checkpoints and export read this table and
nothing else, so a parameter cannot be sharded in one of them and replicated in another.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fivefold.parallel_core.box import Box
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.pieces import Piece, Placement, local_values
from fivefold.parallel_core.topology import PP_ENDS, Axis, Topology

__all__ = ["Mains", "ParameterTable", "Piece", "Placement", "initialise", "local_values"]

# Elements that are drawn with one seed; small enough that a rank never makes a tensor much larger
# than what it keeps, large enough that seeding costs nothing.
_BLOCK = 1 << 20


class Mains(Protocol):
    """Parameters of which this rank updates another tensor than the module's own."""

    def main(self, name: str) -> nn.Parameter:
        """The tensor that is updated."""
        ...

    def box(self, name: str) -> Box:
        """Where it lies in the module's parameter."""
        ...


class ParameterTable(Mapping[str, Placement]):
    """Global parameter name to its placement.

    Args:
        topology: the ranks; the default is one process by itself.
    """

    def __init__(self, topology: Topology | None = None):
        self.topology = topology or Topology.local()
        self._rows: dict[str, Placement] = {}
        self._mains: dict[str, Mains] = {}
        self._copies: dict[str, Axis] = {}
        # Names in the last stage of parameters that are the first stage's.
        self._tied: dict[str, str] = {}

    @classmethod
    def of(cls, model: nn.Module) -> "ParameterTable":
        """The table of a model that is not parallel: every parameter whole."""
        table = cls()
        for name, parameter in model.named_parameters():
            table.add(name, Placement(shape=tuple(parameter.shape)))
        return table

    def __getitem__(self, name: str) -> Placement:
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, name: str, placement: Placement) -> None:
        """Enter a parameter.

        Raises:
            ConfigError: it is there already.
        """
        if name in self._rows:
            raise ConfigError(f"two rules of the plan place the parameter {name!r}; it needs one")
        self._rows[name] = placement

    def tie(self, name: str, original: str) -> bool:
        """Let ``name`` of the last pipeline stage be the parameter ``original`` of the first.

        Each end then has a part of its gradient, and the first one counts it. Ranks that hold
        neither do nothing. Both ends of a pipeline must call it in the same order.

        Returns:
            Whether this rank has both, in two stages: then ``original`` alone has a piece, and the
            other is for a ``Twin`` to keep equal.

        Raises:
            ConfigError: this rank has both, and they lie over the ranks in different ways.
        """
        row, at_first = self._rows.pop(name, None), self._rows.get(original)
        if row is None and at_first is None:
            return False
        if row is not None:
            self._tied[name] = original
        if row is not None and at_first is not None:
            if row != at_first:
                raise ConfigError(
                    f"{name} and {original} are one parameter, but the plan lays one out as {row} "
                    f"and the other as {at_first}; give both the same style"
                )
            return True
        there = row or at_first
        if there is not None:
            self.topology.axis(PP_ENDS)  # its group is made now, in one order on both ends
            self._rows[original] = replace(there, partial=(*there.partial, PP_ENDS))
        return False

    def set_copies(self, data: str, axis: Axis) -> None:
        """Say which ranks of the data axes ``data`` update equal copies."""
        self._copies[data] = axis

    def set_mains(self, name: str, mains: Mains) -> None:
        """Say that another tensor than the module's is updated for a parameter."""
        self._mains[name] = mains

    def updated(self, model: nn.Module, name: str) -> nn.Parameter:
        """What the optimizer steps on for the parameter that ``model`` calls ``name``."""
        mains = self._mains.get(name)
        return model.get_parameter(name) if mains is None else mains.main(name)

    def pieces(self, model: nn.Module) -> list[Piece]:
        """What this rank holds of ``model``'s parameters, in the model's order.

        A tied parameter of which this rank has both ends is listed with the first.

        Raises:
            ConfigError: a parameter that no rule of the plan placed.
        """
        held = [(name, self._tied.get(name, name), p) for name, p in model.named_parameters()]
        missing = [name for _, name, _ in held if name not in self._rows]
        if missing:
            raise ConfigError(
                f"no rule of the plan places the parameter(s) {', '.join(missing)}; every "
                "parameter needs one, so that its gradient is reduced over the right ranks"
            )
        return [
            self._piece(name, local, parameter)
            for local, name, parameter in held
            if local == name or PP_ENDS in self._rows[name].partial
        ]

    def _piece(self, name: str, local: str, parameter: nn.Parameter) -> Piece:
        """The piece of a parameter that the module calls ``local``."""
        placement = self._rows[name]
        # On dims of the module's tensor, then the shard of the data axes inside it.
        shape = list(parameter.shape)
        offset = [0] * len(shape)
        for dim, axis in placement.sharded:
            offset[dim] = self.topology.rank(axis) * shape[dim]
        inner = Box.whole(shape)
        if local in self._mains:
            parameter, inner = self._mains[local].main(local), self._mains[local].box(local)
        elif isinstance(parameter, DTensor):
            size, start = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            inner = Box(tuple(start), tuple(size))
        corner = tuple(a + b for a, b in zip(offset, inner.offset, strict=True))
        box = Box(corner, inner.size).intersect(Box.whole(placement.shape))
        if box.numel == 0:
            box = Box((0,) * len(shape), (0,) * len(shape))
        counted = local == name and self._is_counted(placement)
        return Piece(name, parameter, box, placement, counted)

    def buffers(self, model: nn.Module) -> list[Piece]:
        """What ``model`` keeps beside its parameters: its persistent floating-point buffers.

        Every rank that has one holds it whole and changes it as all others do.
        """
        found = [
            (f"{prefix}.{name}" if prefix else name, buffer)
            for prefix, module in model.named_modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set and buffer.is_floating_point()
        ]
        first = all(self.topology.rank(axis) == 0 for axis in ("tp", "dp-cp"))
        return [
            Piece(
                name, buffer, Box.whole(buffer.shape), Placement(shape=tuple(buffer.shape)), first
            )
            for name, buffer in found
        ]

    def _is_counted(self, placement: Placement) -> bool:
        """Whether this rank is the one that counts, of those that hold equal pieces."""
        copies = self._copies.get(placement.data)
        if copies is not None and copies.rank > 0:
            return False
        return all(self.topology.rank(axis) == 0 for axis in placement.replicated())


def initialise(pieces: list[Piece], rule: Callable[[str], tuple[str, float]], seed: int) -> None:
    """Fill every parameter so that the whole model does not depend on the layout.

    Each block of a parameter is drawn from a generator seeded by (seed, name, block), whoever
    holds it; a rank draws the blocks that its box touches and keeps its part.

    Args:
        pieces: what this rank holds.
        rule: name to ("normal", standard deviation), ("ones", 0) or ("zeros", 0).
        seed: of the whole model.

    Raises:
        ConfigError: ``rule`` names another kind.
    """
    for piece in pieces:
        kind, scale = rule(piece.name)
        piece.local.zero_()
        if kind == "normal":
            _fill_normal(piece, scale, seed)
        elif kind == "ones":
            piece.tensor.fill_(1.0)
        elif kind != "zeros":
            raise ConfigError(
                f"initialisation {kind!r} of {piece.name}; there are 'normal', 'ones' and 'zeros'"
            )


def _fill_normal(piece: Piece, std: float, seed: int) -> None:
    """Draw the piece as a stack of matrices; a vector is a matrix of one column."""
    column = (1,) if len(piece.shape) == 1 else ()
    box = Box(piece.box.offset + (0,) * len(column), piece.box.size + column)
    target = piece.tensor.view(box.size) if column else piece.tensor
    rows = (piece.shape + column)[-2]
    for index in product(*map(range, box.size[:-2])):
        where = [i + start for i, start in zip(index, box.offset, strict=False)]
        key = f"{seed}/{piece.name}/{where}"
        _fill_matrix(target[index], (rows, (piece.shape + column)[-1]), box, std, key)


def _fill_matrix(target: Tensor, shape: tuple[int, int], box: Box, std: float, key: str) -> None:
    """Draw the blocks of rows that the box's last two dims touch, and keep what is in the box."""
    rows, columns = shape
    height = max(1, _BLOCK // columns)
    first, stop = box.slices[-2].start, box.slices[-2].stop
    for block in range(first // height, -(-stop // height) if stop > first else 0):
        start, end = block * height, min(rows, (block + 1) * height)
        drawn = _draw((end - start, columns), std, f"{key}/{block}")
        low, high = max(start, first), min(end, stop)
        part = drawn[low - start : high - start, box.slices[-1]]
        target[low - first : high - first].copy_(part)


def _draw(shape: tuple[int, int], std: float, key: str) -> Tensor:
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest())
    generator = torch.Generator().manual_seed(seed)
    # In one dtype on one device, whatever the defaults: the values are the model's, not the run's.
    drawn = torch.empty(shape, dtype=torch.float32, device="cpu")
    return drawn.normal_(0.0, std, generator=generator)
