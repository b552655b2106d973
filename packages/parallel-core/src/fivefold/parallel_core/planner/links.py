"""Seconds of collectives: ring algorithms and all-to-all, over links inside and between nodes.

A ring that runs through nodes leaves each by as many ports as it has ranks there (NCCL's rings do),
so that its rate is the smaller of the node's link and of those ports together. Rows of an
all-to-all that stay in a node and those that leave go at once, each over its own link.
"""

from functools import lru_cache
from typing import NamedTuple

from fivefold.parallel_core.planner.hardware import Hardware
from fivefold.parallel_core.planner.setup import Setup


class Reach(NamedTuple):
    """A group of ranks.

    Attributes:
        size: ranks in it.
        inside: of them, those of one node.
    """

    size: int
    inside: int


@lru_cache(maxsize=65536)
def reaches(setup: Setup, node_size: int) -> dict[str, Reach]:
    """The groups of every axis, in the order tp, cp, dp, pp and etp, ep, edp, pp."""
    tensor, experts = setup.tp * setup.cp, setup.etp * setup.ep
    axes = {
        "tp": (setup.tp, 1),
        "cp": (setup.cp, setup.tp),
        "dp-cp": (setup.dp * setup.cp, setup.tp),
        "etp": (setup.etp, 1),
        "ep": (setup.ep, setup.etp),
        "edp": (setup.edp, experts),
        "pp": (setup.pp, tensor * setup.dp),
    }
    return {
        name: Reach(size, max(1, min(size, node_size // stride)))
        for name, (size, stride) in axes.items()
    }


def seconds(machine: Hardware, collective: str, reach: Reach, calls: float, size: float) -> float:
    """Of so many calls in which one rank sends ``size`` bytes in all."""
    if reach.size == 1 or not calls:
        return 0.0
    inside = machine.node_bandwidth * machine.link_efficiency
    outside = machine.network_bandwidth * machine.network_efficiency
    leaves = reach.inside < reach.size
    latency = machine.network_latency if leaves else machine.node_latency
    if collective == "send":
        return calls * latency + size / (outside if reach.inside == 1 else inside)
    if collective == "all_to_all":
        away = (reach.size - reach.inside) / (reach.size - 1)
        return calls * latency + max(size * (1 - away) / inside, size * away / outside)
    steps = (2 if collective == "all_reduce" else 1) * (reach.size - 1)
    if leaves:
        # Inside a node the steps are of its faster link.
        nodes = -(-reach.size // reach.inside)
        across = steps * (nodes - 1) / (reach.size - 1)
        delay = calls * (across * latency + (steps - across) * machine.node_latency)
        return delay + size / min(inside, reach.inside * outside)
    return calls * steps * latency + size / inside
