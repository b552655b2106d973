"""How evenly tokens go to the experts: figures of a step, and a picture of a run.

Legend: E experts, P ranks of "ep".
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fivefold.parallel_core.training.metrics import read_jsonl

_LAYER_KEY = re.compile(r"layer(\d+)_load_max_over_mean")
_LOSSES = ("aux_loss", "global_loss", "z_loss")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadFigures:
    """What a step's side outputs say of the routers; called with their sums over all ranks.

    Args:
        ep: ranks that hold different experts of a layer.
        edp: groups of such ranks, with other tokens each.
        row_bytes: of a token's hidden state.

    Its result has, summed over layers, the mean loss of a sequence under its name; as the mean over
    layers ``load_max_over_mean``, what the busiest expert has over what an expert has on average,
    and ``dropped_fraction`` of the copies where there is a capacity; and of every layer

    - ``layer<i>_load_min``, ``_mean``, ``_p95`` and ``_max``: copies of tokens that an expert was
      chosen for, over the step;
    - ``layer<i>_load_max_over_mean``;
    - ``layer<i>_dropped``: the fraction that found no place;
    - ``layer<i>_rank_bytes_mean`` and ``_max``: what a rank's experts receive in the step, on
      average and at the busiest place of "ep", before anything is dropped.
    """

    ep: int = 1
    edp: int = 1
    row_bytes: int = 0

    def __call__(self, sums: Mapping[str, Tensor], num_sequences: int) -> dict[str, float]:
        """Figures from sums by name, and the number of sequences of the step."""
        figures = {n: float(sums[n]) / num_sequences for n in _LOSSES if n in sums}
        layers = sorted(int(name[5:]) for name in sums if name.startswith("load."))
        of_layers = [self._of_layer(sums[f"load.{i}"], sums.get(f"dropped.{i}")) for i in layers]
        if of_layers:
            for key in ("load_max_over_mean", "dropped"):
                values = [layer[key] for layer in of_layers if key in layer]
                if values:
                    figures[_TOTALS[key]] = sum(values) / len(values)
            worst = max(layer["load_max_over_mean"] for layer in of_layers)
            figures["load_max_over_mean_worst"] = worst
        for i, layer in zip(layers, of_layers, strict=True):
            figures |= {f"layer{i}_{key}": value for key, value in layer.items()}
        return figures

    def _of_layer(self, load_e: Tensor, dropped: Tensor | None) -> dict[str, float]:
        load_e = load_e.double()
        mean = float(load_e.mean())
        figures = {
            "load_min": float(load_e.min()),
            "load_mean": mean,
            "load_p95": float(torch.quantile(load_e, 0.95)),
            "load_max": float(load_e.max()),
            "load_max_over_mean": float(load_e.max()) / mean if mean else 1.0,
        }
        if dropped is not None:
            figures["dropped"] = float(dropped) / max(float(load_e.sum()), 1.0)
        if self.row_bytes:
            bytes_p = load_e.view(self.ep, -1).sum(1) * (self.row_bytes / self.edp)
            figures["rank_bytes_mean"] = float(bytes_p.mean())
            figures["rank_bytes_max"] = float(bytes_p.max())
        return figures


_TOTALS = {"load_max_over_mean": "load_max_over_mean", "dropped": "dropped_fraction"}


def plot_load(metrics_jsonl: str | Path, png: str | Path) -> None:
    """Draw how far every layer is from balance, step by step; 1 is balanced.

    Args:
        metrics_jsonl: of a run.
        png: picture to write; the ending of the name says the format.

    Raises:
        DataError: no such file.
        ImportError: matplotlib is not installed.
    """
    records = [r for r in read_jsonl(metrics_jsonl) if any(map(_LAYER_KEY.fullmatch, r))]
    if not records:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'plots need matplotlib: pip install "fivefold-parallel-core[train]"'
        ) from error
    layers = _layers(records)
    rows = [[record.get(_key(i)) or float("nan") for record in records] for i in layers]
    steps = [record["step"] for record in records]
    figure = Figure(figsize=(8.0, 1.2 + 0.22 * max(len(layers), 6)), layout="constrained")
    axes = figure.subplots()
    edges = [*steps, steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1)]
    mesh = axes.pcolormesh(edges, range(len(layers) + 1), rows, cmap="magma_r", vmin=1.0)
    axes.set_yticks([i + 0.5 for i in range(len(layers))], [str(layer) for layer in layers])
    axes.set(xlabel="step", ylabel="layer")
    figure.colorbar(mesh, ax=axes, label="load of the busiest expert / mean")
    figure.savefig(png, dpi=150)


def _layers(records: Iterable[Mapping[str, Any]]) -> list[int]:
    found = (_LAYER_KEY.fullmatch(key) for record in records for key in record)
    return sorted({int(match[1]) for match in found if match})


def _key(layer: int) -> str:
    return f"layer{layer}_load_max_over_mean"
