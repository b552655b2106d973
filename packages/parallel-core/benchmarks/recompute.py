"""Bytes that a GPT block keeps and its step time under each way to recompute, on 1 and 4 ranks.

``python packages/parallel-core/benchmarks/recompute.py`` writes ``recompute.json`` beside itself
and prints the table of the README. The block is that of the tests, whose bytes they hold to the
terms of arXiv 2205.05198. Steps of all settings take turns; what counts is the fastest, of the
slowest rank. On one machine four ranks share its cores: compare settings, not numbers of ranks.
"""

import argparse
import importlib.util
import json
import platform
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fivefold.parallel_core import ActivationLedger, Layout, Topology, launch, parallelize
from fivefold.parallel_core import recompute as recompute_regions

HERE = Path(__file__).resolve().parent
SHAPE = {"B": 2, "S": 256, "H": 256, "A": 8}
LAYERS = 2
MODES = ("none", "selective", "full")


def block_module() -> ModuleType:
    """The tests' GPT block in this benchmark's shape."""
    spec = importlib.util.spec_from_file_location("gpt", HERE.parent / "tests" / "gpt.py")
    assert spec is not None and spec.loader is not None
    gpt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpt)
    vars(gpt).update(SHAPE)
    return gpt


def make(
    gpt: ModuleType, topology: Topology, sequence: bool, mode: str
) -> tuple[nn.Module, Tensor]:
    """A model under one setting, and an input for it."""
    model = gpt.GPT(LAYERS)
    parallelize(model, topology, gpt.plan(sequence))
    recompute_regions(model, mode)
    length = SHAPE["S"] // topology.size("tp") if sequence else SHAPE["S"]
    return model, torch.randn(SHAPE["B"], length, SHAPE["H"], requires_grad=True)


def measure(gpt: ModuleType, t: int, repeats: int) -> list[dict[str, Any]]:
    """Bytes per layer and seconds of each step, of every setting, on this rank."""
    topology = Topology(Layout(t, tp=t)) if t > 1 else Topology.local()
    settings = [(sequence, mode) for sequence in (False, True)[: min(t, 2)] for mode in MODES]
    made = [make(gpt, topology, *setting) for setting in settings]
    found = []
    for (sequence, mode), (model, x) in zip(settings, made, strict=True):
        with ActivationLedger(model) as ledger:
            y = model(x)
            kept = sum(ledger.terms().values()) / LAYERS
        y.sum().backward()
        found.append({"sequence": sequence, "mode": mode, "bytes": kept, "seconds": []})
    for _ in range(repeats):
        for entry, (model, x) in zip(found, made, strict=True):
            if t > 1:
                dist.barrier()
            start = time.perf_counter()
            model(x).sum().backward()
            entry["seconds"].append(time.perf_counter() - start)
    return found


def merged(ranks: list[list[dict[str, Any]]], t: int) -> list[dict[str, Any]]:
    """One row a setting: the most bytes, and the fastest step of the slowest rank."""
    rows = []
    for entries in zip(*ranks, strict=True):
        steps = [max(times) for times in zip(*(e["seconds"] for e in entries), strict=True)]
        rows.append(
            {
                "ranks": t,
                "sequence": entries[0]["sequence"],
                "mode": entries[0]["mode"],
                "bytes_per_layer": max(e["bytes"] for e in entries),
                "seconds_min": min(steps),
                "seconds": steps,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown; times are relative to the first setting of the same ranks."""
    lines = ["| ranks | layers | recompute | KiB a layer | step |", "|---|---|---|---|---|"]
    for row in rows:
        base = next(r["seconds_min"] for r in rows if r["ranks"] == row["ranks"])
        layers = "whole" if row["ranks"] == 1 else "TP+SP" if row["sequence"] else "TP"
        kept, ratio = row["bytes_per_layer"] / 1024, row["seconds_min"] / base
        lines.append(f"| {row['ranks']} | {layers} | {row['mode']} | {kept:,.0f} | {ratio:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=40, help="steps of each setting")
    repeats = parser.parse_args().repeats
    gpt = block_module()
    rows = [row for t in (1, 4) for row in merged(launch(measure, t, gpt, t, repeats), t)]
    result = {
        "shape": SHAPE,
        "layers": LAYERS,
        "dtype": "float32",
        "threads_per_rank": 1,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "rows": rows,
    }
    (HERE / "recompute.json").write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
