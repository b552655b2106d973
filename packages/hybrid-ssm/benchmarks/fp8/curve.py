"""Loss of a small hybrid over 1,000 steps in FP8, in BF16 and in float32: same data, same seed.

``python curve.py train KIND --run FOLDER`` for each of fp8, bfloat16 and float32 (a run that is
killed goes on when called again), then ``python curve.py report --run FOLDER`` writes curve.json
and curve.png beside this file.
"""

import argparse
import json
from pathlib import Path

import torch

from fivefold.hybrid_ssm import fp8
from fivefold.hybrid_ssm.train import load_run, make_trainer
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.topology import Topology
from fivefold.parallel_core.training.metrics import read_jsonl
from fivefold.parallel_core.training.report import RunReport

HERE = Path(__file__).parent
KINDS = {"float32": "float32", "bfloat16": "bfloat16", "fp8": "bfloat16"}
WINDOW = 100
COLOURS = {"float32": "#4477aa", "bfloat16": "#228833", "fp8": "#cc3311"}


def train(kind: str, run: Path) -> None:
    """One run, from its newest checkpoint if there is one."""
    torch.set_num_threads(1)
    overrides = {"training.precision.compute": KINDS[kind]}
    config = load_run(HERE / "curve.toml", overrides)
    folder = run / kind
    trainer = make_trainer(config, Topology(Layout(1)), folder)
    if kind == "fp8":
        (part,) = trainer.model.parts
        print("in FP8:", ", ".join(fp8.recipe(part, first=1, last=1)))
    step = trainer.resume()
    with RunReport(folder, config.training.steps, step, config.to_dict()) as report:
        trainer.report = report
        outcome = trainer.fit()
    print(kind, outcome)


def report(run: Path) -> None:
    """The curves of the finished runs, and their gaps at the end."""
    losses = {kind: read(run / kind, "loss") for kind in KINDS}
    heldout = {kind: read(run / kind, "heldout_loss") for kind in KINDS}
    last = {kind: sum(values[-WINDOW:]) / WINDOW for kind, values in losses.items()}
    gaps = {
        f"fp8 to {other}": {
            f"training, mean of the last {WINDOW} steps": last["fp8"] / last[other] - 1,
            "held-out, after the last step": heldout["fp8"][-1] / heldout[other][-1] - 1,
        }
        for other in ("bfloat16", "float32")
    }
    figures = {
        "model": "curve.toml, 1,000 steps of 1,024 tokens",
        "recipe": "first 1 and last 1 layer in BF16, E4M3 and E5M2, current scaling, emulated",
        "training_loss_of_the_last_steps": last,
        "heldout_loss": heldout,
        "relative_gap": gaps,
        "training_loss_every_10_steps": {
            kind: [round(sum(v[i : i + 10]) / 10, 5) for i in range(0, len(v), 10)]
            for kind, v in losses.items()
        },
    }
    (HERE / "curve.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(gaps, indent=1))
    draw(losses)


def read(folder: Path, key: str) -> list[float]:
    """What a run measured, in the order of its steps."""
    records = sorted(read_jsonl(folder / "metrics.jsonl"), key=lambda record: record["step"])
    return [record[key] for record in records if key in record]


def draw(losses: dict[str, list[float]]) -> None:
    """Curves above, gap to BF16 below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    smooth = {kind: running(values) for kind, values in losses.items()}
    for kind, values in smooth.items():
        above.plot(range(25, 25 + len(values)), values, label=kind, color=COLOURS[kind], lw=1)
    for kind in ("fp8", "float32"):
        pairs = zip(smooth[kind], smooth["bfloat16"], strict=True)
        gap = [100 * (a / b - 1) for a, b in pairs]
        below.plot(range(25, 25 + len(gap)), gap, color=COLOURS[kind], lw=1)
    below.axhline(0, color=COLOURS["bfloat16"], lw=0.8)
    above.set_ylabel("training loss, nats a byte\n(mean of 50 steps)")
    below.set_ylabel("% above BF16")
    below.set_xlabel("step")
    above.legend(frameon=False)
    figure.savefig(HERE / "curve.png", dpi=150)


def running(values: list[float], window: int = 50) -> list[float]:
    """Means of so many values in a row."""
    return [sum(values[i : i + window]) / window for i in range(len(values) - window + 1)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("train", "report"))
    parser.add_argument("kind", nargs="?", choices=tuple(KINDS), default="fp8")
    parser.add_argument("--run", type=Path, required=True)
    options = parser.parse_args()
    if options.what == "train":
        launch(train, 1, options.kind, options.run)
    else:
        report(options.run)
