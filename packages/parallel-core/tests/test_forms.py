"""The law for every form of data parallelism, by itself and in products with all other axes.

Two clipped AdamW steps of the toy against plain torch in one process, as in test_plan. One
sequence of the batch counts no token, so that with a sequence to each rank one rank has none, and
five tokens of another count none, so that ranks of "cp" differ.
"""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import pytest

from fivefold.parallel_core.data_parallel_config import DataParallelConfig
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.styles import SplitContext

from .rig import Case, fresh_topology, make_job, parallel_run, plain_run, worst
from .toy import ToyConfig, resized

TOLERANCE = 1e-12
STEPS = 2
DENSE = ToyConfig(num_layers=1)
MIXTURE = resized(DENSE, num_experts=4)
STAGED = ToyConfig(num_layers=4, num_experts=4)
HEADS = {"layers.*.attention.core": SplitContext("heads")}
OWN = ("config", "sequence", "stages_per_rank", "schedule", "regions", "microbatch_size", "changes")


def case(form: str, **values: Any) -> Case:
    """A case; what is neither the case's nor the form's is the layout's."""
    own = {name: values.pop(name) for name in OWN if name in values}
    forms = ("shard_size", "expert_form", "expert_shard_size")
    data = {name: values.pop(name) for name in forms if name in values}
    config = STAGED if values.get("pp", 1) > 1 else MIXTURE
    return Case(
        degrees=values,
        data=DataParallelConfig(form=form, **data),  # type: ignore[arg-type]
        **{"config": config, **own},
    )


def alone(world_size: int) -> list[Case]:
    """Every form by itself."""
    forms = [case(form) for form in ("replicate", "zero1", "zero2", "zero3")]
    if world_size > 2:
        forms += [
            case(form, shard_size=size, expert_shard_size=2)
            for form in ("zero1", "zero2", "zero3")
            for size in {1, 2, world_size // 2}
        ]
    return forms


PRODUCTS = [
    case("replicate", tp=2),
    case("zero1", config=DENSE, tp=2, sequence=False),
    case("zero1", tp=4, ep=2, etp=2, microbatch_size=2),
    case("zero2", tp=2, shard_size=2),
    case("zero1", cp=4, microbatch_size=2),
    case("replicate", cp=2, ep=2, changes=HEADS),
    case("zero3", cp=2, shard_size=4, ep=4, etp=2, changes=HEADS),
    case("replicate", pp=2),
    case("zero1", pp=4, ep=2),
    case("zero3", pp=2, shard_size=2),
    case("zero1", ep=4, expert_form="zero3"),
    case("zero3", ep=2, expert_form="zero1", expert_shard_size=2),
    case("replicate", etp=4, expert_form="zero2"),
    case("zero2", ep=2, etp=2, expert_form="replicate"),
    case("zero1", tp=2, cp=2, ep=2, etp=2, microbatch_size=2),
    case("zero3", tp=2, cp=2, ep=4, shard_size=2, microbatch_size=4),
    case("zero1", tp=2, pp=2, shard_size=1, expert_form="zero3", microbatch_size=2),
    case("replicate", tp=2, cp=2, pp=2, etp=2, expert_form="zero1", microbatch_size=2),
    case("zero1", pp=2, ep=2, stages_per_rank=2),
    case("zero1", tp=2, pp=2, ep=2, stages_per_rank=2, schedule="DualPipeV"),
    case("replicate", pp=2, stages_per_rank=2, schedule="ZBVZeroBubble", expert_form="zero2"),
    case("zero1", pp=2, stages_per_rank=2, schedule="ZBVZeroBubble", expert_form="zero3"),
    case("zero1", tp=2, shard_size=2, order="dp-ep-cp-tp-pp", ep=2, microbatch_size=2),
    case("zero1", cp=2, regions="full", ep=4, expert_shard_size=1, microbatch_size=2),
    case("zero1", config=resized(DENSE, tied=True, num_key_heads=2), tp=4),
]
AT_16 = [
    case("zero1", tp=2, cp=2, ep=4, shard_size=2, expert_shard_size=2, microbatch_size=2),
    case("zero3", tp=2, cp=2, pp=2, ep=4, etp=2, expert_form="zero1", microbatch_size=2),
    case("replicate", cp=2, ep=4, etp=2, expert_form="zero2"),
    case("zero2", tp=4, etp=2, ep=2, shard_size=2, expert_shard_size=2, microbatch_size=2),
]
CASES: Mapping[int, list[Case]] = {
    2: alone(2),
    4: alone(4),
    8: [*alone(8), *PRODUCTS],
    16: AT_16,
}
FLAT = [(world_size, index) for world_size, cases in CASES.items() for index in range(len(cases))]


def errors_on_a_rank(world_size: int) -> list[tuple[float, str]]:
    """The largest error of every case on this rank, and of what."""
    found: dict[int, tuple[float, str]] = {}
    cases = CASES[world_size]
    by_layout = sorted(range(len(cases)), key=lambda index: str(cases[index].degrees))
    for _, indices in groupby(by_layout, lambda index: str(cases[index].degrees)):
        some = list(indices)
        topology = fresh_topology(cases[some[0]].degrees)
        for index in some:
            job = make_job(cases[index], topology)
            found[index] = worst(job, parallel_run(job, STEPS), REFERENCES[cases[index].config])
    return [found[index] for index in range(len(cases))]


REFERENCES: dict[ToyConfig, Any] = {}


@pytest.fixture(scope="module")
def errors() -> dict[int, list[list[tuple[float, str]]]]:
    """For every number of ranks and rank the error of each case."""
    for cases in CASES.values():
        REFERENCES.update(
            {c.config: plain_run(c.config, STEPS) for c in cases if c.config not in REFERENCES}
        )
    return {size: launch(errors_on_a_rank, size, size, timeout=500) for size in CASES}


@pytest.mark.parametrize(
    ("world_size", "index"), FLAT, ids=[f"{size} ranks {CASES[size][i]}" for size, i in FLAT]
)
def test_every_form_trains_as_one_process(
    errors: dict[int, list[list[tuple[float, str]]]], world_size: int, index: int
) -> None:
    assert len(errors[world_size]) == world_size
    assert max(rank[index] for rank in errors[world_size]) < (TOLERANCE, "")


def test_there_are_enough_products() -> None:
    """Of at least two ways of parallelism each."""
    assert sum(len(c.degrees) > 0 for size in (8, 16) for c in CASES[size]) >= 20
