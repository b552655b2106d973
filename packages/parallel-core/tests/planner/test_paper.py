"""The figures of arXiv 2205.05198 that its formulas give exactly."""

import pytest

from fivefold.parallel_core.pipeline_config import PipelineConfig
from fivefold.parallel_core.planner.flops import hardware_flops, model_flops, utilisation
from fivefold.parallel_core.planner.memory import boundary_saving
from fivefold.parallel_core.planner.models import ModelShape
from fivefold.parallel_core.planner.paper import (
    layer_activations,
    layers_activations,
    layers_states,
)
from fivefold.parallel_core.planner.parameters import total_parameters
from fivefold.parallel_core.planner.presets import preset
from fivefold.parallel_core.planner.setup import Recompute, Setup

GIB, A100 = 2**30, 312e12
RUNS = {
    "22B": (8, 1, 1, 4, 4),
    "175B": (64, 8, 3, 64, 1),
    "530B": (280, 35, 3, 280, 1),
    "1T": (512, 64, 1, 512, 1),
}
"""Table 3: ranks, pp, stages on each, sequences in a step and in a microbatch."""


def run(name: str, sequence: bool, recompute: Recompute) -> tuple[ModelShape, Setup]:
    ranks, pp, parts, batch, microbatch = RUNS[name]
    schedule = "Interleaved1F1B" if parts > 1 else "1F1B"
    return preset(name), Setup(
        world_size=ranks,
        length=2048,
        global_batch=batch,
        tp=8,
        pp=pp,
        sequence=sequence,
        microbatch=microbatch,
        recompute=recompute,
        pipeline=PipelineConfig(schedule=schedule, stages_per_rank=parts),
    )


@pytest.mark.parametrize(
    ("name", "states", "whole", "little"),
    [
        ("22B", 45.5625, 59.25, 9.5625),
        ("175B", 45.5625, 66.84375, 12.3515625),
        ("530B", 31.640625, 114.0234375, 23.076171875),
        ("1T", 32.958984375, 131.25, 26.5625),
    ],
)
def test_figure_1_to_the_byte(name: str, states: float, whole: float, little: float) -> None:
    assert layers_states(*run(name, False, "none")) == states * GIB
    assert layers_activations(*run(name, False, "none")) == whole * GIB
    assert layers_activations(*run(name, True, "selective")) == little * GIB


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("22B", (66.84, 49.42, 16.18, 7.64)),
        ("175B", (62.04, 56.53, 18.49, 8.71)),
        ("530B", (58.31, 62.04, 20.27, 9.42)),
        ("1T", (58.31, 62.04, 20.27, 9.42)),
    ],
)
def test_figure_7_as_far_as_it_can_be_read_off(name: str, shares: tuple[float, ...]) -> None:
    ways: list[tuple[bool, Recompute]] = [
        (True, "none"),
        (False, "selective"),
        (True, "selective"),
        (False, "full"),
    ]
    base = layer_activations(*run(name, False, "none"))
    found = [100 * layer_activations(*run(name, *way)) / base for way in ways]
    assert found == pytest.approx(shares, abs=0.15)


def test_appendix_b() -> None:
    assert boundary_saving(*run("530B", True, "selective"), rank=0) == 2 * 2048 * 20480 * 35
    assert round(2 * 2048 * 20480 * 35 / GIB, 2) == 2.73


@pytest.mark.parametrize(
    ("name", "seconds", "mfu", "hfu"),
    [
        ("22B", 1.10, 41.5, 43.7),
        ("175B", 13.75, 51.4, 52.8),
        ("530B", 37.83, 56.0, 57.0),
        ("1T", 71.49, 56.3, 57.0),
    ],
)
def test_table_5(name: str, seconds: float, mfu: float, hfu: float) -> None:
    ranks, _, _, batch, _ = RUNS[name]
    model = preset(name)
    useful = model_flops(model, 2048, batch)
    paper = hardware_flops(model, 2048, batch, "selective", "paper")
    exact = hardware_flops(model, 2048, batch, "selective")
    assert 100 * utilisation(useful, seconds, ranks, A100) == pytest.approx(mfu, abs=0.2)
    assert 100 * utilisation(paper, seconds, ranks, A100) == pytest.approx(hfu, abs=0.2)
    assert paper - useful == pytest.approx(3 * (exact - useful))
    h, s, layers, v = model.hidden, 2048, model.num_layers, model.vocabulary
    unit = 72 * batch * layers * s * h**2
    assert useful == pytest.approx(unit * (1 + s / (6 * h) + v / (12 * h * layers)), rel=1e-15)
    assert paper == pytest.approx(unit * (1 + s / (3 * h) + v / (12 * h * layers)), rel=1e-15)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("22B", 22.07),
        ("175B", 174.6),
        ("530B", 529.6),
        ("1T", 1008),
        ("Mixtral-8x22B", 140.6),
        ("Mixtral-8x22B-G8T8", 140.6),
        ("Qwen2-57B-A14B", 57.4),
        ("Llama3-8x70B", 465.2),
    ],
)
def test_parameters(name: str, billions: float) -> None:
    assert total_parameters(preset(name)) / 1e9 == pytest.approx(billions, rel=5e-4)


@pytest.mark.parametrize(
    ("name", "full", "causal"),
    [
        ("Mixtral-8x22B", 250.62, 242.17),
        ("Mixtral-8x22B-G8T8", 149.15, 140.70),
        ("Qwen2-57B-A14B", 87.12, 84.65),
        ("Llama3-8x70B", 787.45, 771.35),
    ],
)
def test_flops_of_a_token(name: str, full: float, causal: float) -> None:
    """Those of arXiv 2504.14960's models at 4096 tokens, in GFLOP."""
    for half, expected in ((False, full), (True, causal)):
        found = model_flops(preset(name), 4096, 1, half) / 4096 / 1e9
        assert found == pytest.approx(expected, rel=1e-3)
