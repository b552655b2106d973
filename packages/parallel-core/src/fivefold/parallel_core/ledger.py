"""Counting what is sent: calls and bytes of every collective, axis by axis."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from fivefold.parallel_core.topology import AXES, Topology

# The axis that a collective of this package is being called for. Axes with equal members share a
# group, so the group alone does not say which of them is meant.
_labels: list[str] = []


@contextmanager
def labelled(axis: str) -> Iterator[None]:
    """Ledger entries made inside are booked on ``axis``."""
    _labels.append(axis)
    try:
        yield
    finally:
        _labels.pop()


@dataclass(slots=True)
class Entry:
    """Calls of one collective on one axis, and the bytes that this rank sent in them.

    Attributes:
        calls: how many.
        bytes: sent by this rank.
        bytes_between_nodes: those of them that left its node.
    """

    calls: int = 0
    bytes: float = 0
    bytes_between_nodes: float = 0


def _nbytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (list, tuple)):
        return sum(_nbytes(v) for v in value)
    return 0


def _ring_all_reduce(args: tuple[Any, ...], size: int) -> float:
    return 2 * (size - 1) / size * _nbytes(args[0])


def _ring_all_gather(args: tuple[Any, ...], size: int) -> float:
    return (size - 1) / size * _nbytes(args[0])


def _ring_reduce_scatter(args: tuple[Any, ...], size: int) -> float:
    return (size - 1) / size * _nbytes(args[1])


def _sent(args: tuple[Any, ...], size: int) -> float:
    return float(_nbytes(args[0]))


def _tree_broadcast(args: tuple[Any, ...], size: int) -> float:
    return (size - 1) / size * _nbytes(args[0])


def _all_to_all_rows(args: tuple[Any, ...], size: int) -> float:
    _, rows, group, _, splits, *_ = args
    if not splits:
        return (size - 1) / size * _nbytes(rows)
    others = sum(splits) - splits[dist.ProcessGroup.unbox(group).rank()]
    return others * _nbytes(rows) / max(rows.shape[0], 1)


def _share_away(name: str, args: tuple[Any, ...], nodes: Sequence[int], here: int) -> float:
    """Share of what member ``here`` sends that goes to another node; ``nodes`` are the members'."""
    away = [node != nodes[here] for node in nodes]
    if name == "send":
        return float(away[args[2]])
    if name == "all_to_all":
        rows = [*args[4]] or [1] * len(nodes)
        sent = sum(rows) - rows[here]
        return sum(n for n, leaves in zip(rows, away, strict=True) if leaves) / max(sent, 1)
    return float(away[(here + 1) % len(nodes)])


# Operator of torch's c10d library -> (name in the ledger, bytes that one rank sends).
_COLLECTIVES: dict[str, tuple[str, Callable[[tuple[Any, ...], int], float]]] = {
    "allreduce_": ("all_reduce", _ring_all_reduce),
    "_allgather_base_": ("all_gather", _ring_all_gather),
    "allgather_": ("all_gather", _ring_all_gather),
    "_reduce_scatter_base_": ("reduce_scatter", _ring_reduce_scatter),
    "reduce_scatter_": ("reduce_scatter", _ring_reduce_scatter),
    "broadcast_": ("broadcast", _tree_broadcast),
    "alltoall_base_": ("all_to_all", _all_to_all_rows),
    "send": ("send", _sent),
}


class CommLedger(TorchDispatchMode):
    """Counts calls and bytes per collective and axis while it is entered.

    This package's collectives are seen, FSDP's, and the pipeline's messages. Bytes are what one
    rank sends with ring algorithms, t ranks and n bytes of the full tensor (arXiv 2205.05198,
    section 4.2.2): all-reduce 2(t-1)/t·n, all-gather and reduce-scatter (t-1)/t·n, all-to-all the
    rows for other ranks, send n. A ring goes through the ranks of a group in their order, and a
    rank's bytes go to the one behind it.

    Args:
        topology: the ranks, whose axes give the entries their names.
        ranks_per_node: consecutive ranks on one node, for ``bytes_between_nodes``; None counts
            every rank on the same one.

    Example:
        >>> with CommLedger(topology) as ledger:      # doctest: +SKIP
        ...     model(x).sum().backward()
        >>> ledger["all_gather", "tp"].calls          # doctest: +SKIP
        6
    """

    def __init__(self, topology: Topology, ranks_per_node: int | None = None):
        super().__init__()
        self._ranks_per_node = ranks_per_node or topology.layout.world_size
        self._sizes: dict[str, tuple[str, int]] = {}
        for name in reversed(AXES):
            axis = topology.axis(name)
            if axis.group is not None:
                self._sizes[axis.group.group_name] = (name, axis.size)
        self.entries: dict[tuple[str, str], Entry] = defaultdict(Entry)

    def __getitem__(self, key: tuple[str, str]) -> Entry:
        """The entry of ``(collective, axis)``; an empty one where nothing was sent."""
        return self.entries.get(key, Entry())

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func.namespace == "c10d":
            self._record(func._opname, args)
        return func(*args, **(kwargs or {}))

    def _record(self, op: str, args: tuple[Any, ...]) -> None:
        if op not in _COLLECTIVES:
            return
        name, cost = _COLLECTIVES[op]
        group = dist.ProcessGroup.unbox(next(a for a in args if isinstance(a, torch.ScriptObject)))
        axis, size = self._sizes.get(group.group_name, ("other", group.size()))
        entry = self.entries[name, _labels[-1] if _labels else axis]
        entry.calls += 1
        sent = cost(args, size)
        entry.bytes += sent
        ranks = dist.get_process_group_ranks(group)
        nodes = [rank // self._ranks_per_node for rank in ranks]
        entry.bytes_between_nodes += sent * _share_away(name, args, nodes, group.rank())

    def report(self) -> str:
        """A table: collective, axis, calls, bytes sent by this rank."""
        lines = [f"{'collective':<16}{'axis':<10}{'calls':>8}{'bytes sent':>16}"]
        for (name, axis), entry in sorted(self.entries.items()):
            lines.append(f"{name:<16}{axis:<10}{entry.calls:>8}{entry.bytes:>16,.0f}")
        return "\n".join(lines)
