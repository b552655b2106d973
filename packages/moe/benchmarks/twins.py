"""Two runs beside each other: held-out loss with experts and of the dense twin.

    fivefold-moe train --config packages/moe/benchmarks/experts.toml --run runs/experts --nproc 1
    fivefold-moe train --config packages/moe/benchmarks/dense.toml --run runs/dense --nproc 1
    python packages/moe/benchmarks/twins.py runs/experts runs/dense --output packages/moe/benchmarks

writes ``twins.json`` and ``twins.png``. Both runs see the same text in the same order, with the
same learning rates, and have as many active parameters for a token.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fivefold.moe.config import MoEConfig
from fivefold.parallel_core.training.metrics import read_jsonl

NAMES = ("experts", "dense")


def curve(run: Path) -> dict[str, Any]:
    """Configuration and held-out bits a byte of a run."""
    heldout = {
        record["step"]: record["heldout_bits_per_byte"]
        for record in read_jsonl(run / "metrics.jsonl")
        if "heldout_bits_per_byte" in record
    }
    model = MoEConfig.from_dict(json.loads((run / "run.json").read_text())["model"])
    return {"model": model.to_dict(), "heldout_bits_per_byte": heldout}


def draw(curves: dict[str, dict[str, Any]], png: Path) -> None:
    """One line a run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for (name, found), colour in zip(curves.items(), ("#cc3311", "#4477aa"), strict=True):
        heldout = found["heldout_bits_per_byte"]
        axes.plot(list(heldout), list(heldout.values()), "o-", label=name, color=colour, ms=3)
    axes.set_xlabel("step")
    axes.set_ylabel("held-out bits a byte")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(png, dpi=150)


def main() -> None:
    """Read, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for name in NAMES:
        parser.add_argument(name, type=Path, help=f"folder of the run: {name}.toml")
    parser.add_argument("--output", type=Path, default=Path(), help="folder (here)")
    options = parser.parse_args()
    curves = {name: curve(getattr(options, name)) for name in NAMES}
    for name, found in curves.items():
        last = max(found["heldout_bits_per_byte"])
        print(f"{name}: {found['heldout_bits_per_byte'][last]:.3f} bits a byte after step {last}")
    draw(curves, options.output / "twins.png")
    figures = {"torch": version("torch"), **curves}
    (options.output / "twins.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
