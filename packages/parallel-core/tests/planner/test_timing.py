"""Estimates of time: what the README says of them, and what must hold of any estimate."""

import json
from pathlib import Path

import pytest

from fivefold.parallel_core.config import replace
from fivefold.parallel_core.pipeline_config import PipelineConfig
from fivefold.parallel_core.planner.activations import Local
from fivefold.parallel_core.planner.hardware import hardware
from fivefold.parallel_core.planner.layer_time import layer_time
from fivefold.parallel_core.planner.links import reaches
from fivefold.parallel_core.planner.presets import preset
from fivefold.parallel_core.planner.setup import Recompute, Setup
from fivefold.parallel_core.planner.timing import step_time

from .test_paper import run

FITTED = ("22B", "175B")
ERRORS = {
    ("22B", "full", 1, 1.42): 0.1,
    ("22B", "selective", 1, 1.10): -2.3,
    ("175B", "full", 1, 18.13): 0.5,
    ("175B", "selective", 1, 13.75): -1.6,
    ("530B", "full", 1, 49.05): 1.2,
    ("530B", "selective", 1, 37.83): -1.0,
    ("1T", "full", 1, 94.42): 3.3,
    ("1T", "selective", 1, 71.49): 3.4,
    ("530B", "selective", 8, 39.15): -3.1,
}
"""The README's: model, recomputation, dp, published seconds (arXiv 2205.05198, table 5)."""


def step_error(name: str, recompute: Recompute, dp: int, published: float) -> float:
    model, setup = run(name, recompute == "selective", recompute)
    setup = replace(
        setup,
        world_size=dp * setup.world_size,
        global_batch=dp * setup.global_batch,
        split_boundary=True,
    )
    return 100 * (step_time(model, setup, hardware("a100")).total / published - 1)


def test_the_readmes_errors() -> None:
    """Three constants were fitted to 22B and 175B; the rest is predicted."""
    found = {key: step_error(*key) for key in ERRORS}
    assert {key: round(error, 1) for key, error in found.items()} == ERRORS
    predicted = [abs(error) for (name, *_), error in found.items() if name not in FITTED]
    assert len(predicted) == 5
    assert sum(predicted) / 5 < 2.5
    assert max(predicted) < 3.5


def test_one_layer_of_22b() -> None:
    """Table 4: milliseconds forward and backward, and what each setting costs."""
    published = {
        (False, "none"): (7.7, 11.9),
        (True, "none"): (7.2, 11.8),
        (False, "full"): (7.7, 19.5),
        (False, "selective"): (7.7, 13.2),
        (True, "selective"): (7.2, 13.1),
    }
    machine = hardware("a100")
    for (sequence, recompute), (forward, backward) in published.items():
        model, setup = run("22B", sequence, recompute)  # type: ignore[arg-type]
        groups = tuple(reaches(setup, machine.node_size).items())
        found = layer_time(model, Local.of(setup), machine, "T", False, groups)
        back = found.backward + sum(found.backward_messages.values())
        assert 1e3 * found.total == pytest.approx(forward + backward, rel=0.02)
        assert 1e3 * back == pytest.approx(backward, rel=0.05)


def test_the_constants_are_the_fit() -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "fit_dense_times.json"
    constants = json.loads(path.read_text())["constants"]
    assert set(constants) == {"efficiency", "half_size", "bandwidth_efficiency"}
    assert {name: getattr(hardware("a100"), name) for name in constants} == constants


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
    ("name", "world_size", "apart", "folded"),
    [
        ("Mixtral-8x22B", 128, (2, 8, 2, 4), (2, 8, 1, 8)),
        ("Llama3-8x70B", 256, (8, 8, 8, 4), (8, 16, 1, 8)),
        ("Qwen2-57B-A14B", 64, (2, 4, 2, 4), (2, 4, 1, 4)),
    ],
)
def test_folding_wins(
    name: str,
    world_size: int,
    apart: tuple[int, int, int, int],
    folded: tuple[int, int, int, int],
) -> None:
    slow, fast = (
        step_time(preset(name), folding(*sizes, world_size, name), hardware("h100"))
        for sizes in (apart, folded)
    )
    assert fast.mfu > slow.mfu


def test_slower_links_cost_time_where_they_are_used() -> None:
    model, setup = run("175B", True, "selective")
    fast = hardware("a100")
    slow = replace(fast, node_bandwidth=fast.node_bandwidth / 2)
    before, after = (step_time(model, setup, machine) for machine in (fast, slow))
    assert after.messages["tp"] > 1.5 * before.messages["tp"]
    assert after.messages["pp"] == before.messages["pp"]
    assert after.compute == before.compute
