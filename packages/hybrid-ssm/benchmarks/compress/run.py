"""Compress a small hybrid to 80 % and to 60 % of its memory, beside random prunings.

First the parent, then a budget at a time, then the report; each goes on where it was killed::

    fivefold-hybrid-ssm train --config teacher.toml --run RUN/teacher
    python run.py 80 --run RUN
    python run.py 60 --run RUN
    python run.py report --run RUN        # writes results.json, results.csv and the plots here

Held-out text throughout. Random prunings keep as many layers of each kind and as many neurons as
the chosen candidate, drawn by seeds 0 to 19, and are not distilled.
"""

import argparse
import json
import resource
import shutil
from pathlib import Path
from typing import Any

import torch

from fivefold.hybrid_ssm.compress.config import CompressConfig
from fivefold.hybrid_ssm.compress.evaluate import Quality
from fivefold.hybrid_ssm.compress.job import Job, candidate_of
from fivefold.hybrid_ssm.compress.pipeline import minipuzzle
from fivefold.hybrid_ssm.compress.prune import best_layers, counts_of, random_scores, whole
from fivefold.hybrid_ssm.compress.search import importance
from fivefold.hybrid_ssm.compress.tables import read_table, write_table
from fivefold.hybrid_ssm.export import export_run
from fivefold.hybrid_ssm.model import HybridForCausalLM
from fivefold.parallel_core.config import load_toml, replace

HERE = Path(__file__).parent
BUDGETS = (80, 60)
NUM_RANDOM = 20


def config_of(budget: int) -> CompressConfig:
    """What a budget asks for."""
    return CompressConfig.from_dict({"budget": f"{budget}%", **load_toml(HERE / "compress.toml")})


def compress(run: Path, budget: int) -> None:
    """One budget, and its random prunings."""
    parent = run / "parent"
    if not (parent / "config.json").exists():
        export_run(run / "teacher", parent)
    minipuzzle(parent, run / str(budget), config_of(budget), tell=lambda text: print(text))
    beside_random(run, budget)
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(each.ru_utime + each.ru_stime for each in spent)
    (run / str(budget) / "cpu_seconds.json").write_text(json.dumps(seconds))
    print(f"CPU time of this call: {seconds:.0f} s")


def beside_random(run: Path, budget: int) -> None:
    """Measure prunings of the chosen one's sizes, by importance and at random."""
    stem = run / str(budget) / "random"
    if read_table(stem) is not None:
        return
    (row,) = read_table(run / str(budget) / "result") or []
    chosen = candidate_of(row)
    with Job(run / "parent", "parent", run / str(budget), config_of(budget), 1, None) as job:
        batches = job.validation()
        scores = importance(job)
        rows = [measured("parent", job.quality(whole(job.parent), scores, batches))]
        rows.append(measured("importance", job.quality(chosen, scores, batches)))
        for seed in range(NUM_RANDOM):
            drawn = random_scores(job.parent, seed)
            layers = best_layers(job.parent, drawn.layers, counts_of(job.parent, chosen))
            quality = job.quality(replace(chosen, layers=layers), drawn, batches)
            rows.append(measured(f"random {seed}", quality))
        rows.append(measured("distilled", job.measured(run / str(budget) / "model")))
    write_table(stem, rows)


def measured(name: str, quality: Quality) -> dict[str, Any]:
    """A row of a table."""
    return {"model": name, **quality.to_dict()}


def report(run: Path) -> None:
    """The tables of both budgets as one, and the checks that they pass."""
    rows: list[dict[str, Any]] = []
    for budget in BUDGETS:
        rows.append(row_of(run, budget))
    write_table(HERE / "results", rows)
    for row in rows:
        print(json.dumps(row, indent=1))
    draw(run, rows)
    folder = run / str(BUDGETS[-1])
    for name in ("importance", "ranking", "choice"):
        shutil.copyfile(folder / f"{name}.png", HERE / f"{name}_{BUDGETS[-1]}.png")


def row_of(run: Path, budget: int) -> dict[str, Any]:
    """What one budget came to."""
    folder = run / str(budget)
    (result,) = read_table(folder / "result") or []
    found = {row["model"]: row for row in read_table(folder / "random") or []}
    losses = {name: row["loss"] for name, row in found.items()}
    drawn = [loss for name, loss in losses.items() if name.startswith("random")]
    gap = losses["importance"] - losses["parent"]
    return {
        "budget": f"{budget}%",
        "pattern": result["pattern"],
        "width": result["width"],
        "memory_bytes": result["memory_bytes"],
        "candidates": len(read_table(folder / "candidates") or []),
        "loss_of_parent": losses["parent"],
        "loss_pruned_by_importance": losses["importance"],
        "loss_pruned_at_random_mean": sum(drawn) / len(drawn),
        "loss_pruned_at_random_best": min(drawn),
        "random_prunings_that_are_worse": sum(loss > losses["importance"] for loss in drawn),
        "loss_distilled": losses["distilled"],
        "share_of_the_gap_closed": (losses["importance"] - losses["distilled"]) / gap,
        "agreement_pruned": found["importance"]["agreement"],
        "agreement_distilled": found["distilled"]["agreement"],
        "distillation_steps": result["steps"],
        "cpu_seconds": json.loads((folder / "cpu_seconds.json").read_text()),
        "transformers_largest_logit_difference": beside_transformers(folder / "model"),
    }


@torch.no_grad()
def beside_transformers(folder: Path) -> float:
    """Load the result in transformers and compare logits."""
    from transformers import AutoModelForCausalLM

    ours = HybridForCausalLM.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    for module in theirs.modules():
        if hasattr(module, "A_log"):
            module.time_step_limit = ours.config.dt_limit  # 5.23 does not read it
    ids = torch.arange(2 * 64).view(2, 64) * 7 % ours.config.vocab_size
    return float((ours(ids) - theirs(ids).logits).abs().max())


def draw(run: Path, rows: list[dict[str, Any]]) -> None:
    """Losses of each budget: random, by importance, distilled, parent."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        budget = row["budget"].removesuffix("%")
        table = read_table(run / budget / "random") or []
        drawn = [each["loss"] for each in table if each["model"].startswith("random")]
        axes.scatter(
            [place] * len(drawn), drawn, s=10, color="#bbbbbb", label="random" * (not place)
        )
        points = (("loss_pruned_by_importance", "by importance", "#4477aa"),
                  ("loss_distilled", "distilled", "#cc3311"))  # fmt: skip
        for key, label, colour in points:
            axes.scatter(place, row[key], s=40, color=colour, label=label if not place else None)
    axes.axhline(rows[0]["loss_of_parent"], color="#228833", lw=1, label="parent")
    axes.set_xticks(range(len(rows)), [f"{row['budget']} of the memory" for row in rows])
    axes.set_xlim(-0.5, len(rows) - 0.5)
    axes.set_ylabel("held-out loss, nats a byte")
    axes.legend(frameon=False)
    figure.savefig(HERE / "results.png", dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("80", "60", "report"))
    parser.add_argument("--run", type=Path, required=True)
    options = parser.parse_args()
    if options.what == "report":
        report(options.run)
    else:
        torch.set_num_threads(1)
        compress(options.run, int(options.what))
