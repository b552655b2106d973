"""What would change the choice: the plans of a search again, on another machine or batch."""

from collections.abc import Iterable
from dataclasses import dataclass

from fivefold.parallel_core.config import replace
from fivefold.parallel_core.planner.hardware import Hardware
from fivefold.parallel_core.planner.links import reaches
from fivefold.parallel_core.planner.memory import GIB, fullest
from fivefold.parallel_core.planner.models import ModelShape
from fivefold.parallel_core.planner.nearest import is_legal
from fivefold.parallel_core.planner.setup import Setup, describe
from fivefold.parallel_core.planner.step_traffic import step_traffic
from fivefold.parallel_core.planner.timing import step_time

_CHANGES = ("network_bandwidth", "node_bandwidth", "bandwidth", "memory", "batch")
_FACTORS = (0.5, 2.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One thing that is other than asked, and the mapping that is best then.

    Attributes:
        what: a field of ``Hardware``, or "batch".
        factor: by which it is multiplied.
        best: the fastest of the mappings that were looked at; None where none fits.
        gain: seconds of a step that it saves over the first choice there; None where the first
            choice does not fit or cannot run.
    """

    what: str
    factor: float
    best: Setup | None
    gain: float | None


def changes(model: ModelShape, setups: Iterable[Setup], machine: Hardware) -> list[Change]:
    """Half and twice of each bandwidth, of the memory and of the batch.

    Args:
        model: what is trained.
        setups: mappings to choose from, the first choice first.
        machine: on what.
    """
    mappings = list(setups)
    return [
        _changed(model, mappings, machine, what, factor) for what in _CHANGES for factor in _FACTORS
    ]


def _changed(
    model: ModelShape, mappings: list[Setup], machine: Hardware, what: str, factor: float
) -> Change:
    if what == "batch":
        mappings = [replace(s, global_batch=int(s.global_batch * factor)) for s in mappings]
    else:
        value = type(getattr(machine, what))(getattr(machine, what) * factor)
        machine = Hardware.from_dict(machine.to_dict() | {what: value})
    times = {
        index: step_time(model, setup, machine).total
        for index, setup in enumerate(mappings)
        if setup.global_batch
        and is_legal(model, setup)
        and fullest(model, setup).total <= machine.usable
    }
    if not times:
        return Change(what=what, factor=factor, best=None, gain=None)
    best = min(times, key=lambda index: times[index])
    gain = times[0] - times[best] if 0 in times else None
    return Change(what=what, factor=factor, best=mappings[best], gain=gain)


def lines(found: Iterable[Change], first: Setup) -> list[str]:
    """A line for each change of the choice, and one that names what changes nothing."""
    told, same = [], []
    for change in found:
        name = f"{change.factor:g} x {change.what}"
        if change.best is None:
            told.append(f"{name}: none of these fits")
        elif describe(change.best) == describe(first):
            same.append(name)
        else:
            saved = "; the first choice cannot run then"
            if change.gain is not None:
                saved = f", {1e3 * change.gain:.1f} ms faster than the first choice"
            told.append(f"{name}: {describe(change.best)}{saved}")
    return [*told, f"the same with {', '.join(same)}"] if same else told


def bytes_by_link(model: ModelShape, setup: Setup, machine: Hardware) -> dict[str, str]:
    """Of each axis the bytes that the first rank sends in a step, and over which link."""
    groups = reaches(setup, machine.node_size)
    sent: dict[str, float] = {}
    for (_, axis), (_, size) in step_traffic(model, setup, 0).items():
        sent[axis] = sent.get(axis, 0.0) + size
    found = {}
    for axis, size in sent.items():
        group = groups.get(axis)
        link = "between nodes" if group and group.inside < group.size else "inside a node"
        found[axis] = f"{size / GIB:.2f} GiB {link}" if group else f"{size / GIB:.2f} GiB"
    return found
