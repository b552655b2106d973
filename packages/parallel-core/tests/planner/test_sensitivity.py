"""What would change the choice of a search."""

import pytest

from fivefold.parallel_core.config import replace
from fivefold.parallel_core.planner.hardware import Hardware, hardware
from fivefold.parallel_core.planner.jobs import Job
from fivefold.parallel_core.planner.memory import fullest
from fivefold.parallel_core.planner.presets import preset
from fivefold.parallel_core.planner.report import table
from fivefold.parallel_core.planner.search import Found, explain, search
from fivefold.parallel_core.planner.sensitivity import bytes_by_link, changes, lines
from fivefold.parallel_core.planner.step_traffic import step_traffic
from fivefold.parallel_core.planner.timing import step_time

JOB = Job(
    model=preset("Mixtral-8x22B"),
    world_size=64,
    length=4096,
    global_batch=64,
    tp=2,
    cp=1,
    microbatches=(1,),
    most_parts=2,
)


@pytest.fixture(scope="module")
def found() -> Found:
    return search(JOB, hardware("h200"))


def test_each_change_names_the_best_under_it(found: Found) -> None:
    machine, setups = hardware("h200"), [plan.setup for plan in found.plans]
    told = {(c.what, c.factor): c for c in changes(JOB.model, setups, machine)}
    assert len(told) == 10
    slow = Hardware.from_dict(
        machine.to_dict() | {"network_bandwidth": machine.network_bandwidth / 2}
    )
    again = search(JOB, slow).plans[0]
    half = told["network_bandwidth", 0.5]
    assert half.best is not None and half.gain is not None
    assert step_time(JOB.model, half.best, slow).total == again.time.total
    first = step_time(JOB.model, setups[0], slow).total
    assert half.gain == pytest.approx(first - again.time.total)


def test_less_memory_leaves_what_fits(found: Found) -> None:
    machine, setups = hardware("h200"), [plan.setup for plan in found.plans]
    small = {(c.what, c.factor): c for c in changes(JOB.model, setups, machine)}["memory", 0.5]
    usable = machine.memory // 2 - machine.reserved
    fits = [setup for setup in setups if fullest(JOB.model, setup).total <= usable]
    assert small.best == (fits[0] if fits else None)
    assert (small.gain is None) == (setups[0] not in fits)


def test_lines_name_what_changes_nothing(found: Found) -> None:
    machine, setups = hardware("h200"), [plan.setup for plan in found.plans[:1]]
    (only,) = lines(changes(JOB.model, setups, replace(machine, reserved=0)), setups[0])[-1:]
    assert only.startswith("the same with 0.5 x network_bandwidth, 2 x network_bandwidth")


def test_bytes_are_the_steps(found: Found) -> None:
    setup = found.plans[0].setup
    told = bytes_by_link(JOB.model, setup, hardware("h200"))
    assert told["tp"].endswith("inside a node") and told["pp"].endswith("between nodes")
    sent = sum(
        size for (_, axis), (_, size) in step_traffic(JOB.model, setup, 0).items() if axis == "pp"
    )
    assert told["pp"] == f"{sent / 2**30:.2f} GiB between nodes"


def test_reports_tell_bytes_and_changes(found: Found) -> None:
    machine = hardware("h200")
    text = table(JOB, machine, found, 3)
    assert "What would change the choice, among " in text and "2 x memory" in text
    other = next(p for p in found.plans if p.setup.pp != found.plans[0].setup.pp)
    assert "GiB between nodes, best " in explain(found.plans[0], other, JOB.model, machine)
