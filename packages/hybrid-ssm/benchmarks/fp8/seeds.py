"""How far FP8 ends from BF16, over several seeds: is the distance more than what seeds make?

``python seeds.py train KIND SEED --run FOLDER`` for bfloat16 and fp8 and each of the seeds 1 to 4,
which give weights and order of the text (a run that is killed goes on when called again), then
``python seeds.py report --run FOLDER`` writes seeds.json beside this file. The runs are those of
curve.toml, but for the seed and for eight times as much held-out text after the last step.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev

import torch

from fivefold.hybrid_ssm.train import load_run, make_trainer
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.topology import Topology
from fivefold.parallel_core.training.metrics import read_jsonl
from fivefold.parallel_core.training.report import RunReport

HERE = Path(__file__).parent
SEEDS = (1, 2, 3, 4)
IN_FP8 = {"fp8.first": "1", "fp8.last": "1"}
KINDS = {"bfloat16": {}, "fp8": IN_FP8}
HELDOUT, WINDOW = 1024, 100


def train(kind: str, seed: int, run: Path) -> None:
    """One run, from its newest checkpoint if there is one."""
    torch.set_num_threads(1)
    overrides = {
        "training.precision.compute": "bfloat16",
        "training.seed": str(seed),
        "training.evaluation_sequences": str(HELDOUT),
        "training.evaluate_every": "1000",
    }
    config = load_run(HERE / "curve.toml", overrides | KINDS[kind])
    folder = run / f"{kind}-{seed}"
    trainer = make_trainer(config, Topology(Layout(1)), folder)
    step = trainer.resume()
    with RunReport(folder, config.training.steps, step, config.to_dict()) as report:
        trainer.report = report
        print(kind, seed, trainer.fit())


def report(run: Path) -> None:
    """Losses of every seed, the gap of each, and what seeds alone make."""
    figures: dict[str, object] = {
        "model": f"curve.toml, 1,000 steps of 1,024 tokens, seeds {list(SEEDS)}",
        "recipe": "first 1 and last 1 layer in BF16, E4M3 and E5M2, current scaling, emulated",
        "heldout_tokens": HELDOUT * 128,
    }
    for what in ("heldout_loss", "loss"):
        ends = {kind: [end(run / f"{kind}-{seed}", what) for seed in SEEDS] for kind in KINDS}
        gaps = [a / b - 1 for a, b in zip(ends["fp8"], ends["bfloat16"], strict=True)]
        figures["held-out" if what == "heldout_loss" else f"training, last {WINDOW} steps"] = {
            **ends,
            "relative_gap_of_each_seed": gaps,
            "mean_gap": mean(gaps),
            "standard_error_of_the_mean": stdev(gaps) / len(gaps) ** 0.5,
            "deviation_between_seeds_in_bfloat16": stdev(ends["bfloat16"]) / mean(ends["bfloat16"]),
        }
    (HERE / "seeds.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


def end(folder: Path, key: str) -> float:
    """What a run had in the end: the last value, or the mean of the last steps' loss."""
    records = sorted(read_jsonl(folder / "metrics.jsonl"), key=lambda record: record["step"])
    values = [record[key] for record in records if key in record]
    return values[-1] if key == "heldout_loss" else mean(values[-WINDOW:])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("train", "report"))
    parser.add_argument("kind", nargs="?", choices=tuple(KINDS), default="fp8")
    parser.add_argument("seed", nargs="?", type=int, choices=SEEDS, default=1)
    parser.add_argument("--run", type=Path, required=True)
    options = parser.parse_args()
    if options.what == "train":
        launch(train, 1, options.kind, options.seed, options.run)
    else:
        report(options.run)
