"""Estimates of time: what the README says of them, and what must hold of any estimate."""

import json
from pathlib import Path

import pytest

from fivefold.parallel_core.config import replace
from fivefold.parallel_core.planner.hardware import hardware
from fivefold.parallel_core.planner.layer_time import layer_time
from fivefold.parallel_core.planner.links import reaches
from fivefold.parallel_core.planner.local import Local
from fivefold.parallel_core.planner.setup import Recompute
from fivefold.parallel_core.planner.timing import step_time

from .test_paper import run

FITTED = ("22B", "175B")
ERRORS = {
    ("22B", "full", 1, 1.42): 0.4,
    ("22B", "selective", 1, 1.10): -1.0,
    ("175B", "full", 1, 18.13): 0.2,
    ("175B", "selective", 1, 13.75): 0.8,
    ("530B", "full", 1, 49.05): -1.1,
    ("530B", "selective", 1, 37.83): -0.6,
    ("1T", "full", 1, 94.42): 0.2,
    ("1T", "selective", 1, 71.49): 3.2,
    ("530B", "selective", 8, 39.15): -2.6,
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
    assert sum(predicted) / 5 < 1.6
    assert max(predicted) < 3.3


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
        found = layer_time(model, Local.of(setup), machine, "T", groups)
        assert 1e3 * found.total == pytest.approx(forward + backward, rel=0.02)


def test_the_constants_are_the_fit() -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "fit_dense_times.json"
    constants = json.loads(path.read_text())["constants"]
    assert set(constants) == {"efficiency", "half_size", "bandwidth_efficiency"}
    assert {name: getattr(hardware("a100"), name) for name in constants} == constants


def test_slower_links_cost_time_where_they_are_used() -> None:
    model, setup = run("175B", True, "selective")
    fast = hardware("a100")
    slow = replace(fast, node_bandwidth=fast.node_bandwidth / 2)
    before, after = (step_time(model, setup, machine) for machine in (fast, slow))
    assert after.messages["tp"] > 1.5 * before.messages["tp"]
    assert after.messages["pp"] == before.messages["pp"]
    assert after.compute == before.compute
