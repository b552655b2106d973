"""Estimates of time: what the README says of them, and what must hold of any estimate."""

import pytest

from fivefold.parallel_core.config import replace
from fivefold.parallel_core.pipeline_config import PipelineConfig
from fivefold.parallel_core.planner.hardware import hardware
from fivefold.parallel_core.planner.presets import preset
from fivefold.parallel_core.planner.setup import Recompute, Setup
from fivefold.parallel_core.planner.timing import step_time

from .test_paper import run


@pytest.mark.parametrize(
    ("name", "recompute", "published", "error"),
    [
        ("22B", "full", 1.42, -19.5),
        ("22B", "selective", 1.10, -17.3),
        ("175B", "full", 18.13, -8.2),
        ("175B", "selective", 13.75, -9.4),
        ("530B", "full", 49.05, 5.5),
        ("530B", "selective", 37.83, -2.7),
        ("1T", "full", 94.42, 3.8),
        ("1T", "selective", 71.49, 3.7),
    ],
)
def test_the_readmes_errors(
    name: str, recompute: Recompute, published: float, error: float
) -> None:
    time = step_time(*run(name, recompute == "selective", recompute), hardware("a100"))
    assert round(100 * (time.total / published - 1), 1) == error


def folding(tp: int, pp: int, etp: int, ep: int, world_size: int, name: str) -> Setup:
    parts = max(1, preset(name).num_layers // pp)
    return Setup(
        world_size=world_size,
        length=4096,
        global_batch=256,
        tp=tp,
        pp=pp,
        etp=etp,
        ep=ep,
        pipeline=PipelineConfig(schedule="Interleaved1F1B", stages_per_rank=parts),
    )


@pytest.mark.parametrize(
    ("name", "world_size", "apart", "folded", "mfu"),
    [
        ("Mixtral-8x22B", 128, (2, 8, 2, 4), (2, 8, 1, 8), (53.3, 54.6)),
        ("Llama3-8x70B", 256, (8, 8, 8, 4), (8, 16, 1, 8), (45.9, 48.6)),
        ("Qwen2-57B-A14B", 64, (2, 4, 2, 4), (2, 4, 1, 4), (43.4, 43.6)),
    ],
)
def test_folding_wins_as_the_readme_says(
    name: str,
    world_size: int,
    apart: tuple[int, int, int, int],
    folded: tuple[int, int, int, int],
    mfu: tuple[float, float],
) -> None:
    found = [
        step_time(preset(name), folding(*sizes, world_size, name), hardware("h100"))
        for sizes in (apart, folded)
    ]
    assert tuple(round(100 * time.mfu, 1) for time in found) == mfu


def test_slower_links_cost_time_where_they_are_used() -> None:
    model, setup = run("175B", True, "selective")
    fast = hardware("a100")
    slow = replace(fast, node_bandwidth=fast.node_bandwidth / 2)
    before, after = (step_time(model, setup, machine) for machine in (fast, slow))
    assert after.messages["tp"] > 1.5 * before.messages["tp"]
    assert after.messages["pp"] == before.messages["pp"]
    assert after.compute == before.compute
