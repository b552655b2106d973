"""All legal mappings of a model: those that fit, by predicted time, and why the best is best."""

from collections.abc import Iterable
from dataclasses import dataclass

from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.planner.advice import nothing
from fivefold.parallel_core.planner.hardware import Hardware
from fivefold.parallel_core.planner.jobs import Job, legal_setups
from fivefold.parallel_core.planner.memory import StageMemory, fullest
from fivefold.parallel_core.planner.models import ModelShape
from fivefold.parallel_core.planner.nearest import require_legal
from fivefold.parallel_core.planner.sensitivity import bytes_by_link
from fivefold.parallel_core.planner.setup import Setup, describe
from fivefold.parallel_core.planner.timing import StepTime, step_time

_MESSAGES = "messages on "


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A mapping that fits.

    Attributes:
        setup: the mapping.
        memory: of the fullest pipeline rank.
        time: of a step.
    """

    setup: Setup
    memory: StageMemory
    time: StepTime


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a search found.

    Attributes:
        plans: those that fit, the fastest first.
        num_legal: mappings that were looked at.
    """

    plans: list[Plan]
    num_legal: int


def plan(model: ModelShape, setup: Setup, machine: Hardware, causal: bool = False) -> Plan:
    """One mapping's memory and time, whether it fits or not.

    Raises:
        ConfigError: the mapping cannot run; the message has the nearest that can.
    """
    require_legal(model, setup)
    held = fullest(model, setup)
    return Plan(setup=setup, memory=held, time=step_time(model, setup, machine, causal))


def search(job: Job, machine: Hardware) -> Found:
    """Look at all legal mappings.

    Raises:
        ConfigError: none is legal, or none fits; the message has the one that comes nearest.
    """
    plans, count = [], 0
    nearest: tuple[int, Setup] | None = None
    for setup in legal_setups(job):
        count += 1
        held = fullest(job.model, setup)
        if held.total <= machine.usable:
            time = step_time(job.model, setup, machine, job.causal)
            plans.append(Plan(setup=setup, memory=held, time=time))
        elif nearest is None or held.total < nearest[0]:
            nearest = (held.total, setup)
    if not plans:
        raise ConfigError(nothing(job, machine, nearest))
    plans.sort(key=lambda plan: (plan.time.total, plan.memory.total))
    return Found(plans=plans, num_legal=count)


def pareto(plans: Iterable[Plan]) -> list[Plan]:
    """Those that no other beats in both time and memory, the fastest first."""
    found: list[Plan] = []
    for plan in sorted(plans, key=lambda plan: (plan.time.total, plan.memory.total)):
        if not found or plan.memory.total < found[-1].memory.total:
            found.append(plan)
    return found


def explain(best: Plan, other: Plan, model: ModelShape, machine: Hardware) -> str:
    """Where another plan spends the time that the best one saves, most first.

    Of messages it tells the bytes that a rank sends in a step of the other plan and of the best,
    and the link that they go over.
    """
    mine, theirs = _spent(best.time), _spent(other.time)
    gaps = {name: theirs.get(name, 0.0) - mine.get(name, 0.0) for name in mine | theirs}
    order = sorted(gaps, key=lambda name: -abs(gaps[name]))
    sent = [bytes_by_link(model, plan.setup, machine) for plan in (other, best)]
    words = [
        f"{name} {1e3 * gaps[name]:+.1f} ms{_bytes(name, *sent)}"
        for name in order
        if abs(gaps[name]) > 5e-5
    ]
    seconds = 1e3 * (other.time.total - best.time.total)
    return f"{describe(other.setup)} takes {seconds:.1f} ms more: {', '.join(words) or 'no term'}"


def _bytes(name: str, theirs: dict[str, str], mine: dict[str, str]) -> str:
    axis = name.removeprefix(_MESSAGES)
    if axis == name:
        return ""
    return f" ({theirs.get(axis, 'nothing')}, best {mine.get(axis, 'nothing')})"


def _spent(time: StepTime) -> dict[str, float]:
    messages = {f"{_MESSAGES}{axis}": seconds for axis, seconds in time.messages.items()}
    rest = {"compute": time.compute, "bubble": time.bubble, "optimizer": time.optimizer}
    return rest | messages
