"""Three constants of an H100 fitted to four cells of arXiv 2504.14960, and the others predicted.

``python packages/parallel-core/benchmarks/fit_folding_times.py`` writes the constants into the
planner's ``machines/h100.toml`` and ``fit_folding_times.json`` beside itself. Cells are MFU of
table 1 (256 sequences in a step) and of table 4 (1024), of 4096 tokens; mappings are of table 3.

Fitted: ``efficiency``, the share of the peak FLOP/s; ``link_efficiency`` and
``network_efficiency``, shares of the links' bandwidth inside and between nodes. Taken over from the
fit of ``fit_dense_times.py``: ``bandwidth_efficiency``. Fitted to: Mixtral-8x22B coupled and
folded, Qwen2-57B folded, Mixtral-8x22B-G8T8 coupled, all of table 1.

What the paper does not say is assumed: one sequence in a microbatch; as many stages on each
pipeline rank as it has layers; gradients and weights of a step's end overlap with kernels, in
float32 and bfloat16; MFU counts attention in full and kernels leave out what the mask hides. FSDP
has the form "zero3" with bfloat16 gradients that are summed over ranks once a step. Of G8T8 only
the coupled stride of experts (2, over 2 nodes) and the microbatches of the folded run (64) are
known: TP2 EP8 ETP2 PP8, and TP4 EP8 PP8.

Four sets of cells to fit to were tried; this one left the least error in the other cells.
"""

import json
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from fitting import fit, write_constants

from fivefold.parallel_core.config import replace
from fivefold.parallel_core.data_parallel_config import DataParallelConfig, Form
from fivefold.parallel_core.files import write_json
from fivefold.parallel_core.pipeline_config import PipelineConfig
from fivefold.parallel_core.planner.hardware import Hardware, hardware
from fivefold.parallel_core.planner.memory import GIB, fullest
from fivefold.parallel_core.planner.nearest import is_legal
from fivefold.parallel_core.planner.presets import preset
from fivefold.parallel_core.planner.setup import Setup, describe
from fivefold.parallel_core.planner.timing import step_time

HERE = Path(__file__).resolve().parent
Mapped = tuple[int, int, int, int, int, Form]
MIXTRAL, G8T8 = "Mixtral-8x22B", "Mixtral-8x22B-G8T8"
QWEN, LLAMA = "Qwen2-57B-A14B", "Llama3-8x70B"
MAPPINGS: dict[str, dict[str, Mapped]] = {
    MIXTRAL: {
        "FSDP": (8, 1, 1, 8, 1, "zero3"),
        "FSDP+EP": (2, 1, 1, 2, 8, "zero3"),
        "TP+EP+DP": (4, 1, 1, 4, 8, "zero1"),
        "coupled": (2, 1, 8, 2, 4, "zero1"),
        "folded": (2, 1, 8, 1, 8, "zero1"),
    },
    LLAMA: {
        "FSDP": (8, 8, 1, 8, 1, "zero3"),
        "FSDP+EP": (8, 1, 1, 8, 8, "zero3"),
        "TP+EP+DP": (8, 1, 1, 8, 8, "zero1"),
        "coupled": (8, 1, 8, 8, 4, "zero1"),
        "folded": (8, 1, 16, 1, 8, "zero1"),
    },
    QWEN: {
        "FSDP": (2, 1, 1, 2, 1, "zero3"),
        "FSDP+EP": (1, 1, 1, 1, 8, "zero3"),
        "TP+EP+DP": (4, 1, 1, 4, 4, "zero1"),
        "coupled": (2, 1, 4, 2, 4, "zero1"),
        "folded": (2, 1, 4, 1, 4, "zero1"),
    },
    G8T8: {"coupled": (2, 1, 8, 2, 8, "zero1"), "folded": (4, 1, 8, 1, 8, "zero1")},
}
"""Table 3: tp, cp, pp, etp, ep and the form of data parallelism."""
TABLE_1: dict[str, tuple[int, dict[str, float | None]]] = {
    MIXTRAL: (
        128,
        {"FSDP": 4.3, "FSDP+EP": 23.4, "TP+EP+DP": 36.6, "coupled": 46.3, "folded": 49.3},
    ),
    LLAMA: (
        256,
        {"FSDP": None, "FSDP+EP": 19.6, "TP+EP+DP": None, "coupled": 38.8, "folded": 41.6},
    ),
    QWEN: (64, {"FSDP": 9.9, "FSDP+EP": 25.4, "TP+EP+DP": 23.1, "coupled": 35.3, "folded": 39.0}),
    G8T8: (128, {"coupled": 17.1, "folded": 28.8}),
}
"""Devices, and MFU in percent by method; None is out of memory."""
TABLE_4: dict[str, dict[str, dict[int, float]]] = {
    MIXTRAL: {
        "FSDP+EP": {128: 23.9, 256: 25.5, 512: 24.4, 1024: 23.8},
        "TP+EP+DP": {128: 40.4, 256: 39.1, 512: 36.0, 1024: 36.2},
        "coupled": {128: 49.4, 256: 48.0, 512: 45.5, 1024: 42.3},
        "folded": {128: 52.2, 256: 50.7, 512: 48.9, 1024: 44.9},
    },
    QWEN: {
        "FSDP+EP": {64: 26.3, 128: 25.6, 256: 23.4, 512: 22.8, 1024: 21.6},
        "TP+EP+DP": {64: 22.4, 128: 20.9, 256: 19.8, 512: 19.7, 1024: 17.9},
        "coupled": {64: 36.2, 128: 36.0, 256: 34.8, 512: 32.5, 1024: 29.8},
        "folded": {64: 39.9, 128: 39.7, 256: 38.1, 512: 36.6, 1024: 33.4},
    },
    LLAMA: {
        "FSDP+EP": {256: 18.9, 512: 17.3, 1024: 17.1},
        "coupled": {256: 40.1, 512: 39.5, 1024: 39.1},
        "folded": {256: 43.7, 512: 42.7, 1024: 41.5},
    },
}
"""MFU by method and number of devices."""
FITTED = {(MIXTRAL, "coupled"), (MIXTRAL, "folded"), (QWEN, "folded"), (G8T8, "coupled")}
START = {"efficiency": 0.75, "link_efficiency": 0.7, "network_efficiency": 0.6}
BOUNDS = dict.fromkeys(START, (0.2, 1.0))
Cell = tuple[str, str, int, int, float | None]


def cells() -> list[Cell]:
    """Model, method, devices, sequences in a step, MFU."""
    found: list[Cell] = [
        (model, method, devices, 256, mfu)
        for model, (devices, column) in TABLE_1.items()
        for method, mfu in column.items()
    ]
    found += [
        (model, method, devices, 1024, mfu)
        for model, methods in TABLE_4.items()
        for method, row in methods.items()
        for devices, mfu in row.items()
    ]
    return found


def setup(model: str, method: str, devices: int, batch: int, length: int = 4096) -> Setup:
    """A run of the paper, as far as it is known."""
    tp, cp, pp, etp, ep, form = MAPPINGS[model][method]
    parts = preset(model).num_layers // pp if pp > 1 else 1
    return Setup(
        world_size=devices,
        length=length,
        global_batch=batch,
        tp=tp,
        cp=cp,
        pp=pp,
        etp=etp,
        ep=ep,
        sequence=tp > 1,
        gradient_size=2 if form == "zero3" else 4,
        data=DataParallelConfig(form=form, overlap=form == "zero1"),
        pipeline=PipelineConfig(
            schedule="Interleaved1F1B" if parts > 1 else "1F1B", stages_per_rank=parts
        ),
    )


def row(cell: Cell, machine: Hardware) -> dict[str, Any]:
    """A cell with its estimate."""
    model, method, devices, batch, mfu = cell
    run = setup(model, method, devices, batch)
    held = fullest(preset(model), run).total
    found: dict[str, Any] = {
        "model": model,
        "method": method,
        "devices": devices,
        "batch": batch,
        "published": mfu,
        "gib": round(held / GIB, 1),
        "fits": held <= machine.usable,
        "fitted": batch == 256 and (model, method) in FITTED,
    }
    estimate = 100 * step_time(preset(model), run, machine).mfu
    error = None if mfu is None else 100 * (estimate / mfu - 1)
    return found | {"estimate": estimate, "error": error}


def long_context(machine: Hardware) -> list[dict[str, Any]]:
    """Predictions for longer sequences: the fastest folded mapping that fits, nothing compared.

    128 devices for Mixtral-8x22B and 64 for Qwen2-57B, 2**22 tokens in a step, EP and PP as folded
    above, TP and CP of 1 to 16, each way to recompute.
    """
    found = []
    for model, length in product((MIXTRAL, QWEN), (16384, 32768, 65536, 131072)):
        devices = TABLE_1[model][0]
        base = setup(model, "folded", devices, 2**22 // length, length)
        choices = [
            replace(base, tp=tp, cp=cp, sequence=tp > 1, recompute=again)
            for tp, cp, again in product((1, 2, 4, 8), (1, 2, 4, 8, 16), ("none", "full"))
        ]
        fits = [
            run
            for run in choices
            if is_legal(preset(model), run) and fullest(preset(model), run).total <= machine.usable
        ]
        times = [(step_time(preset(model), run, machine).mfu, run) for run in fits]
        mfu, run = max(times, key=lambda pair: pair[0])
        causal = step_time(preset(model), run, machine, causal=True).mfu
        found.append(
            {
                "model": model,
                "length": length,
                "devices": devices,
                "batch": run.global_batch,
                "mapping": describe(run),
                "mfu": round(100 * mfu, 1),
                "mfu_causal": round(100 * causal, 1),
            }
        )
    return found


def errors(constants: Mapping[str, float]) -> list[float]:
    """Of the cells that are fitted to, in percent."""
    machine = replace(hardware("h100"), **constants)
    rows = [cell for cell in cells() if cell[3] == 256 and cell[:2] in FITTED]
    return [row(cell, machine)["error"] for cell in rows]


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Mean and largest error of coupled and folded cells that were predicted, in percent."""
    sizes = [
        abs(cell["error"])
        for cell in rows
        if cell["method"] in ("coupled", "folded") and not cell["fitted"]
    ]
    mean = round(sum(sizes) / len(sizes), 2)
    return {"cells": len(sizes), "mean": mean, "max": round(max(sizes), 2)}


def main() -> None:
    """Fit, predict, write."""
    constants = fit(errors, START, BOUNDS)
    constants["bandwidth_efficiency"] = hardware("a100").bandwidth_efficiency
    write_constants("h100", constants)
    machine = replace(hardware("h100"), **constants)
    rows = [row(cell, machine) for cell in cells()]
    for cell in rows:
        for name in ("estimate", "error"):
            cell[name] = None if cell[name] is None else round(cell[name], 2)
    result = {"constants": constants, "predicted": summary(rows), "cells": rows}
    result["long_context"] = long_context(machine)
    write_json(HERE / "fit_folding_times.json", result)
    print(json.dumps(result["constants"]), json.dumps(result["predicted"]))
    for cell in rows + result["long_context"]:
        print(*cell.values())


if __name__ == "__main__":
    main()
