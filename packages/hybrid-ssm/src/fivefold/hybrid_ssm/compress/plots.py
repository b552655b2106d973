"""Pictures of a compression: layers' importance, candidates, distillation."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fivefold.hybrid_ssm.pattern import ATTENTION, EXPERTS, LETTERS, MAMBA, MLP
from fivefold.parallel_core.training.metrics import read_jsonl

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {MAMBA: "#4477aa", ATTENTION: "#cc3311", MLP: "#999933", EXPERTS: "#aa3377"}


def draw(plot: Callable[..., None], *args: object) -> None:
    """Call ``plot`` where matplotlib is installed; a compression does not need it."""
    with contextlib.suppress(ImportError):
        plot(*args)


def _axes(height: float = 3.5) -> "tuple[Any, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plot_importance(pattern: str, scores: Sequence[float], png: Path) -> None:
    """Mean squared error without each layer, by kind; layers of score 0 have no bar.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, axes = _axes()
    for letter, word in LETTERS.items():
        places = [index for index, each in enumerate(pattern) if each == letter]
        if places:
            heights = [scores[index] for index in places]
            axes.bar(places, heights, color=COLOURS[letter], label=word)
    if max(scores) > 0:
        axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.set_ylabel("squared error without it")
    axes.legend(frameon=False)
    figure.savefig(png, dpi=150)


def plot_candidates(rows: Sequence[Mapping[str, Any]], finalists: Sequence[int], png: Path) -> None:
    """Agreement with the parent over memory, of every candidate that was measured."""
    figure, axes = _axes()
    memory = [row["memory_bytes"] / 2**20 for row in rows]
    axes.scatter(memory, [row["agreement"] for row in rows], s=12, color="#bbbbbb", label="ranked")
    chosen = [i for i, row in enumerate(rows) if row["candidate"] in finalists]
    axes.scatter(
        [memory[i] for i in chosen],
        [rows[i]["agreement"] for i in chosen],
        s=30,
        color="#cc3311",
        label="distilled",
    )
    axes.set_xlabel("memory, MiB")
    axes.set_ylabel("agreement with the parent")
    axes.legend(frameon=False)
    figure.savefig(png, dpi=150)


def plot_distillation(runs: Mapping[str, Path], png: Path) -> None:
    """Divergence from the parent while students learn, training faint and held-out strong.

    Args:
        runs: label to metrics file.
        png: picture.
    """
    figure, axes = _axes()
    for number, (label, path) in enumerate(runs.items()):
        records = read_jsonl(path)
        colour = f"C{number}"
        steps, losses = _curve(records, "loss")
        axes.plot(steps, losses, color=colour, alpha=0.3, lw=0.8)
        steps, losses = _curve(records, "heldout_loss")
        axes.plot(steps, losses, color=colour, marker="o", label=label)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("KL from the parent, nats a token")
    axes.legend(frameon=False)
    figure.savefig(png, dpi=150)


def _curve(records: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    found = [record for record in records if key in record]
    return [record["step"] for record in found], [record[key] for record in found]
