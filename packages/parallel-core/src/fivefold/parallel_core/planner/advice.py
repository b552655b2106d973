"""What to change where no mapping of a job is legal, or none fits."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import get_args

from fivefold.parallel_core.data_parallel_config import Form
from fivefold.parallel_core.planner.hardware import Hardware
from fivefold.parallel_core.planner.jobs import Job, legal_setups
from fivefold.parallel_core.planner.memory import GIB, fullest
from fivefold.parallel_core.planner.nearest import DEGREES, around, first_that_fits
from fivefold.parallel_core.planner.setup import Recompute, Setup, describe, divisors


def nothing(job: Job, machine: Hardware, nearest: tuple[int, Setup] | None) -> str:
    """Why a search has no plan, in one line; ``nearest`` is the leanest mapping and its bytes."""
    asked = f"{job.model.name} on {job.world_size} x {machine.name}, length {job.length}, "
    asked += f"batch {job.global_batch}"
    fixed = [f"{axis} {getattr(job, axis)}" for axis in DEGREES if getattr(job, axis)]
    asked += "".join(f", {words}" for words in fixed)
    if nearest is None:
        ways = ", or ".join(legal_changes(job)) or "more than two changes away"
        return f"{asked}: no mapping is legal; the nearest that is: {ways}"
    size, setup = nearest
    return (
        f"{asked}: no mapping fits in {machine.usable / GIB:.1f} GiB; the nearest, "
        f"{describe(setup)}, needs {size / GIB:.1f} GiB, "
        f"{(size - machine.usable) / GIB:.1f} GiB more on each device; {_more(job, machine)}"
    )


def legal_changes(job: Job) -> list[str]:
    """The least changes of a job that make some mapping legal.

    Returns:
        Single changes, one of each field that can do it alone; where none can, the least pair of a
        fixed axis and the batch.
    """
    fixed = {axis: _near_sizes(job, axis) for axis in DEGREES if getattr(job, axis)}
    singles = [_first_legal(job, axis, sizes) for axis, sizes in fixed.items()]
    singles += [_first_legal(job, name, _around(job, name)) for name in _SHOWN]
    found = [way for way in singles if way]
    if found:
        return found
    for axis, sizes in fixed.items():
        for size in sizes:
            new = replace(job, **{axis: size})  # type: ignore[arg-type]
            batch = _first_legal(new, "global_batch", _around(new, "global_batch"))
            if batch:
                return [f"{axis} {size} with {batch}"]
    return []


def _near_sizes(job: Job, axis: str) -> list[int]:
    now: int = getattr(job, axis)
    return sorted(divisors(job.world_size), key=lambda size: (abs(size - now), size))


def _around(job: Job, name: str) -> Iterator[int]:
    steps = {"global_batch": job.world_size * min(job.microbatches), "length": 128}
    return around(getattr(job, name), steps.get(name, 8))


_SHOWN = {"global_batch": "batch", "length": "length", "world_size": "devices"}


def _first_legal(job: Job, name: str, values: Iterable[int]) -> str:
    # Whether any is legal hangs on neither recomputation, ZeRO form nor stages on a rank.
    small = replace(job, recomputes=job.recomputes[:1], forms=job.forms[:1], most_parts=1)
    for value in values:
        new = replace(small, **{name: value})  # type: ignore[arg-type]
        if next(legal_setups(new), None):
            return f"{_SHOWN.get(name, name)} {value}"
    return ""


_DOUBLINGS = 10


def _more(job: Job, machine: Hardware) -> str:
    """How many devices would do, doubled until they do; with a batch that grows as they do."""
    sizes = [job.world_size << n for n in range(1, _DOUBLINGS + 1)]
    same = first_that_fits(sizes, lambda n: _least(replace(job, world_size=n)), machine.usable)
    if same:
        return f"{same[0]} devices would do, with {same[1] / GIB:.1f} GiB on each"
    grown = first_that_fits(
        sizes,
        lambda n: _least(
            replace(job, world_size=n, global_batch=job.global_batch * (n // job.world_size))
        ),
        machine.usable,
    )
    if grown is None:
        return f"{sizes[-1]} devices would not do either, nor a batch that grows with them"
    batch = job.global_batch * (grown[0] // job.world_size)
    return f"{grown[0]} devices would do with batch {batch}, with {grown[1] / GIB:.1f} GiB on each"


def _least(job: Job) -> int | None:
    """Bytes of the leanest mapping; only what saves memory is looked at."""
    lean = replace(
        job,
        recomputes=(max(job.recomputes, key=get_args(Recompute).index),),
        microbatches=(min(job.microbatches),),
        forms=(max(job.forms, key=get_args(Form).index),),
        most_parts=1,
    )
    return min((fullest(job.model, setup).total for setup in legal_setups(lean)), default=None)
