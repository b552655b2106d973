"""What a search found, as a table and as plain data."""

from typing import Any

from fivefold.parallel_core.planner import sensitivity
from fivefold.parallel_core.planner.hardware import Hardware
from fivefold.parallel_core.planner.jobs import Job
from fivefold.parallel_core.planner.memory import GIB
from fivefold.parallel_core.planner.search import Found, Plan, explain, pareto
from fivefold.parallel_core.planner.setup import describe

_LOOKED = 100
"""Of the fastest plans, those that are looked at again under other conditions."""

_TIMES = "Times and MFU are estimates, see the README for their errors; memory is counted."


def table(job: Job, machine: Hardware, found: Found, count: int) -> str:
    """The fastest ``count`` plans, where the best one's memory goes, and why it is the best."""
    shown = found.plans[:count]
    lines = [
        f"{job.model.name} on {job.world_size} x {machine.name}: {len(found.plans)} of "
        f"{found.num_legal} legal mappings fit in {machine.usable / GIB:.1f} GiB",
        f"{'seconds':>9} {'MFU':>6} {'GiB':>7}  mapping",
    ]
    lines += [_line(plan) for plan in shown]
    lines += ["", "Memory of the best, on its fullest pipeline rank:"]
    terms = shown[0].memory.terms
    lines += [f"{size / GIB:>9.2f} GiB  {name}" for name, size in terms.items()]
    if len(shown) > 1:
        lines += ["", "The next: " + explain(shown[0], shown[1], job.model, machine)]
    # Those of less memory too, for when there is less of it.
    near = found.plans[:_LOOKED]
    looked = [plan.setup for plan in near + [p for p in pareto(found.plans) if p not in near]]
    told = sensitivity.lines(sensitivity.changes(job.model, looked, machine), looked[0])
    lines += ["", f"What would change the choice, among {len(looked)} of the plans:"]
    lines += [f"  {line}" for line in told]
    lines += ["", "Less memory for more time:"]
    lines += [_line(plan) for plan in pareto(found.plans)[1 : count + 1]]
    return "\n".join([*lines, "", _TIMES])


def _line(plan: Plan) -> str:
    time, size = plan.time, plan.memory.total / GIB
    return f"{time.total:>9.3f} {time.mfu:>6.1%} {size:>7.1f}  {describe(plan.setup)}"


def as_data(found: Found, count: int) -> dict[str, Any]:
    """Plain data that JSON can hold: seconds and bytes."""
    return {"num_legal": found.num_legal, "plans": [_plan(plan) for plan in found.plans[:count]]}


def _plan(plan: Plan) -> dict[str, Any]:
    time = plan.time
    return {
        "setup": plan.setup.to_dict(),
        "memory": {"rank": plan.memory.rank, "total": plan.memory.total}
        | {"terms": plan.memory.terms},
        "time": {
            "total": time.total,
            "compute": time.compute,
            "bubble": time.bubble,
            "optimizer": time.optimizer,
            "messages": time.messages,
            "mfu": time.mfu,
        },
    }
