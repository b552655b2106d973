"""Three constants of an A100 fitted to published times of two models, and three runs predicted.

``python packages/parallel-core/benchmarks/fit_dense_times.py`` writes the constants into the
planner's ``machines/a100.toml`` and ``fit_dense_times.json`` beside itself. Times are of
arXiv 2205.05198: table 5 (a step) and table 4 (one layer of the 22B model). Only those of 22B and
175B are fitted to; those of 530B, of 1T and of 530B on eight times as many devices are predicted.

What is fitted: ``efficiency``, the share of the peak FLOP/s that a long product reaches;
``half_size``, what starting and ending a tile costs, in terms of its sum; ``bandwidth_efficiency``,
the share of the memory's bandwidth that other kernels reach. Not fitted: the links' share (0.8),
latencies, tiles, and the number of multiprocessors.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fitting import fit, write_constants

from fivefold.parallel_core.config import replace
from fivefold.parallel_core.files import write_json
from fivefold.parallel_core.pipeline_config import PipelineConfig
from fivefold.parallel_core.planner.hardware import Hardware, hardware
from fivefold.parallel_core.planner.layer_time import layer_time
from fivefold.parallel_core.planner.links import reaches
from fivefold.parallel_core.planner.local import Local
from fivefold.parallel_core.planner.presets import preset
from fivefold.parallel_core.planner.setup import Recompute, Setup
from fivefold.parallel_core.planner.timing import step_time

HERE = Path(__file__).resolve().parent
RUNS = {
    "22B": (8, 1, 1, 4, 4),
    "175B": (64, 8, 3, 64, 1),
    "530B": (280, 35, 3, 280, 1),
    "1T": (512, 64, 1, 512, 1),
}
"""Table 3: ranks, pp, stages on each, sequences in a step and in a microbatch."""
STEPS: list[tuple[str, Recompute, int, float]] = [
    ("22B", "full", 1, 1.42),
    ("22B", "selective", 1, 1.10),
    ("175B", "full", 1, 18.13),
    ("175B", "selective", 1, 13.75),
    ("530B", "full", 1, 49.05),
    ("530B", "selective", 1, 37.83),
    ("1T", "full", 1, 94.42),
    ("1T", "selective", 1, 71.49),
    ("530B", "selective", 8, 39.15),
]
"""Table 5 and section 6.3: recomputation ("selective" with sequence parallelism), dp, seconds."""
LAYERS: list[tuple[bool, Recompute, float]] = [
    (False, "none", 19.6),
    (True, "none", 19.0),
    (False, "full", 27.2),
    (False, "selective", 20.9),
    (True, "selective", 20.3),
]
"""Table 4: sequence parallelism, recomputation, milliseconds forward and backward."""
FITTED = ("22B", "175B")
START = {"efficiency": 0.7, "half_size": 128.0, "bandwidth_efficiency": 0.8}
BOUNDS = {
    "efficiency": (0.3, 1.0),
    "half_size": (1.0, 1000.0),
    "bandwidth_efficiency": (0.3, 1.0),
}


def setup(name: str, sequence: bool, recompute: Recompute, dp: int = 1) -> Setup:
    """A run of table 3, on ``dp`` times as many devices."""
    ranks, pp, parts, batch, microbatch = RUNS[name]
    schedule = "Interleaved1F1B" if parts > 1 else "1F1B"
    return Setup(
        world_size=ranks * dp,
        length=2048,
        global_batch=batch * dp,
        tp=8,
        pp=pp,
        sequence=sequence,
        microbatch=microbatch,
        recompute=recompute,
        pipeline=PipelineConfig(schedule=schedule, stages_per_rank=parts),
        split_boundary=True,
    )


def step_errors(machine: Hardware) -> list[dict[str, Any]]:
    """Every published step with its estimate."""
    found = []
    for name, recompute, dp, seconds in STEPS:
        run = setup(name, recompute == "selective", recompute, dp)
        estimate = step_time(preset(name), run, machine).total
        found.append(
            {
                "model": name,
                "recompute": recompute,
                "dp": dp,
                "published": seconds,
                "estimate": round(estimate, 3),
                "error": 100 * (estimate / seconds - 1),
                "fitted": name in FITTED,
            }
        )
    return found


def layer_errors(machine: Hardware) -> list[dict[str, Any]]:
    """Every published layer of the 22B model with its estimate."""
    found = []
    for sequence, recompute, published in LAYERS:
        run = setup("22B", sequence, recompute)
        groups = tuple(reaches(run, machine.node_size).items())
        layer = layer_time(preset("22B"), Local.of(run), machine, "T", groups)
        found.append(
            {
                "sequence": sequence,
                "recompute": recompute,
                "published": published,
                "estimate": round(1e3 * layer.total, 3),
                "error": 100 * (1e3 * layer.total / published - 1),
            }
        )
    return found


def errors(constants: Mapping[str, float]) -> list[float]:
    """Of all that is fitted to, in percent."""
    machine = replace(hardware("a100"), **constants)
    rows = [row for row in step_errors(machine) if row["fitted"]] + layer_errors(machine)
    return [row["error"] for row in rows]


def summary(steps: list[dict[str, Any]]) -> dict[str, float]:
    """Mean and largest error of what was predicted, in percent."""
    sizes = [abs(row["error"]) for row in steps if not row["fitted"]]
    return {"mean": round(sum(sizes) / len(sizes), 2), "max": round(max(sizes), 2)}


def rounded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Errors to two digits."""
    return [row | {"error": round(row["error"], 2)} for row in rows]


def main() -> None:
    """Fit, predict, write."""
    constants = fit(errors, START, BOUNDS)
    write_constants("a100", constants)
    machine = replace(hardware("a100"), **constants)
    steps = step_errors(machine)
    result = {"constants": constants, "predicted": summary(steps), "steps": rounded(steps)}
    result["layers"] = rounded(layer_errors(machine))
    write_json(HERE / "fit_dense_times.json", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
