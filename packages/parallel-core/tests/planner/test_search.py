"""Searches: the optimum of brute force, legal plans only, and errors that name a legal choice."""

import dataclasses
import re
import time
from itertools import product
from typing import Any

import pytest

from fivefold.parallel_core.config import replace
from fivefold.parallel_core.data_parallel_config import DataParallelConfig
from fivefold.parallel_core.errors import ConfigError, LayoutError
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.pipeline_config import PipelineConfig
from fivefold.parallel_core.planner.advice import legal_changes
from fivefold.parallel_core.planner.hardware import hardware, hardware_names
from fivefold.parallel_core.planner.jobs import Job, legal_setups
from fivefold.parallel_core.planner.memory import fullest, memory
from fivefold.parallel_core.planner.models import Experts, ModelShape
from fivefold.parallel_core.planner.presets import preset
from fivefold.parallel_core.planner.search import pareto, plan, search
from fivefold.parallel_core.planner.setup import Setup, check
from fivefold.parallel_core.planner.timing import step_time

SMALL = ModelShape(
    name="small",
    hidden=1024,
    num_layers=6,
    num_heads=8,
    num_kv_heads=4,
    vocabulary=4096,
    gated=True,
    experts=Experts(num_experts=4, top_k=2, ffn=2048),
)
JOB = Job(
    model=SMALL,
    world_size=8,
    length=512,
    global_batch=16,
    microbatches=(1, 2),
    recomputes=("none", "full"),
    most_parts=2,
)


def every_choice() -> list[Setup]:
    """What the axes of 8 ranks and the other choices allow, found without the search's loops."""
    found = []
    for layout in Layout.legal(8):
        for microbatch, again, parts in product((1, 2), ("none", "full"), (1, 2)):
            if parts == 2 and layout.pp == 1:
                continue
            sizes = {axis: getattr(layout, axis) for axis in ("tp", "cp", "pp", "ep", "etp")}
            schedule = "1F1B" if parts == 1 else "Interleaved1F1B"
            setup = Setup(
                world_size=8,
                length=512,
                global_batch=16,
                microbatch=microbatch,
                recompute=again,  # type: ignore[arg-type]
                sequence=layout.tp > 1,
                pipeline=PipelineConfig(schedule=schedule, stages_per_rank=parts),
                data=DataParallelConfig(form="zero1"),
                **sizes,
            )
            try:
                check(SMALL, setup)
            except (ConfigError, LayoutError):
                continue
            found.append(setup)
    return found


def test_the_best_is_brute_forces() -> None:
    machine = replace(hardware("h100"), memory=int(4.8 * 2**30))
    setups = every_choice()
    assert len(set(setups)) == len(setups)
    assert set(legal_setups(JOB)) == set(setups)
    fits = [s for s in setups if max(m.total for m in memory(SMALL, s)) <= machine.usable]
    assert 0 < len(fits) < len(setups)
    found = search(JOB, machine)
    assert found.num_legal == len(setups)
    assert {plan.setup for plan in found.plans} == set(fits)
    assert found.plans[0].time.total == min(step_time(SMALL, s, machine).total for s in fits)


@pytest.mark.parametrize("name", ["175B", "Mixtral-8x22B", "Qwen2-57B-A14B"])
def test_few_ranks_tell_the_fullest(name: str) -> None:
    job = Job(model=preset(name), world_size=16, length=1024, global_batch=32)
    setups = list(legal_setups(job))[::7]
    assert len(setups) > 20
    for setup in setups:
        whole = memory(job.model, setup)
        assert fullest(job.model, setup).total == max(stage.total for stage in whole)


def test_pareto() -> None:
    plans = search(JOB, hardware("h100")).plans
    front = pareto(plans)
    assert front[0].time.total == plans[0].time.total
    for one in plans:
        worse = [
            p.time.total <= one.time.total and p.memory.total <= one.memory.total for p in front
        ]
        assert any(worse)
    sizes = [plan.memory.total for plan in front]
    assert sizes == sorted(set(sizes), reverse=True)


def test_ten_thousand_mappings_take_ten_seconds() -> None:
    job = Job(model=preset("Qwen2-57B-A14B"), world_size=64, length=4096, global_batch=256)
    start = time.process_time()
    found = search(job, hardware("h100"))
    seconds = time.process_time() - start
    assert found.num_legal > 9000
    assert seconds / found.num_legal * 1e4 < 10


def test_nothing_fits() -> None:
    """The message's way out is one: on so many devices some mapping does fit."""
    machine = replace(hardware("h100"), memory=(4 << 30) + (1 << 28))
    with pytest.raises(ConfigError, match=r"no mapping fits in 0\.2 GiB; the nearest, tp") as error:
        search(JOB, machine)
    message = str(error.value)
    assert "\n" not in message
    more = re.search(r"(\d+) devices would do( with batch (\d+))?, with", message)
    assert more is not None
    job = dataclasses.replace(
        JOB, world_size=int(more[1]), global_batch=int(more[3] or JOB.global_batch)
    )
    assert search(job, machine).plans
    half = dataclasses.replace(job, world_size=job.world_size // 2)
    with pytest.raises(ConfigError, match="no mapping"):
        search(half, machine)


@pytest.mark.parametrize(
    "changes",
    [
        {"length": 511, "global_batch": 3, "microbatches": (2,)},
        {"tp": 3},
        {"ep": 8},
        {"pp": 8},
        {"world_size": 7, "global_batch": 8},
    ],
)
def test_nothing_is_legal(changes: dict[str, Any]) -> None:
    """Each way out that the message names makes some mapping legal, and is the nearest."""
    job = dataclasses.replace(JOB, **changes)
    with pytest.raises(ConfigError, match="no mapping is legal; the nearest that is: ") as error:
        search(job, hardware("h100"))
    assert "\n" not in str(error.value)
    ways = legal_changes(job)
    assert ways and str(error.value).endswith(", or ".join(ways))
    for way in ways:
        name, value = way.split()
        field = {"batch": "global_batch", "devices": "world_size"}.get(name, name)
        now, new = getattr(job, field), int(value)
        assert next(legal_setups(dataclasses.replace(job, **{field: new})), None)
        for other in range(max(1, now - abs(new - now) + 1), now + abs(new - now)):
            if field in ("global_batch", "length") and other != new:
                closer = dataclasses.replace(job, **{field: other})
                assert next(legal_setups(closer), None) is None


def test_wrong_input_has_the_nearest_legal_choice() -> None:
    setup = Setup(world_size=6, length=512, global_batch=16, ep=3)
    with pytest.raises(ConfigError, match="ep=3 does not divide num_experts=4; nearest legal: 2"):
        check(SMALL, replace(setup, global_batch=18))
    with pytest.raises(ConfigError, match="no machine 'z9'; legal: a100, b200, h100, h200"):
        hardware("z9")
    with pytest.raises(ConfigError, match="no model '3B'; legal: 22B"):
        preset("3B")


def test_a_size_and_a_batch_that_are_both_wrong() -> None:
    job = Job(model=preset("175B"), world_size=60, length=4096, global_batch=7, tp=7)
    assert legal_changes(job) == ["tp 4 with batch 15"]
    assert next(legal_setups(dataclasses.replace(job, tp=4)), None) is None
    assert next(legal_setups(dataclasses.replace(job, tp=4, global_batch=15)), None)
    far = dataclasses.replace(JOB, tp=3, pp=3)
    with pytest.raises(ConfigError, match="the nearest that is: more than two changes away"):
        search(far, hardware("h100"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tp": 3}, "not a multiple of tp"),
        ({"tp": 16, "world_size": 16}, "tp=16 does not divide num_heads=8"),
        ({"ep": 8}, "ep=8 does not divide num_experts=4"),
        ({"pp": 8}, "8 stages for num_layers=6"),
        ({"global_batch": 13}, "does not divide global_batch=13"),
        ({"length": 511, "tp": 2}, "does not divide length=511"),
    ],
)
def test_a_wrong_mapping_is_told_the_nearest(changes: dict[str, int], said: str) -> None:
    """All changes that the message names, made one at a time, are legal."""
    setup = replace(Setup(world_size=8, length=512, global_batch=16), **changes)
    with pytest.raises(ConfigError, match=said) as error:
        plan(SMALL, setup, hardware("h100"))
    reason, ways = str(error.value).split("; the nearest that can run: ")
    assert "\n" not in reason + ways
    for way in ways.split(", or "):
        new = dict(change.split("=") for change in way.split(", "))
        check(SMALL, replace(setup, **{name: int(value) for name, value in new.items()}))


def test_a_plan_of_ones_own() -> None:
    found = search(JOB, hardware("h100")).plans[3]
    assert plan(SMALL, found.setup, hardware("h100")) == found


def test_machines_read() -> None:
    assert hardware_names() == ["a100", "b200", "h100", "h200"]
    assert hardware("h100").flops == 989.5e12
    assert {hardware(name).node_size for name in hardware_names()} == {8}
