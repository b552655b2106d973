"""Least squares over a few constants of a machine, and writing them into its TOML."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fivefold.parallel_core.files import atomic_write_text

MACHINES = Path(__file__).parents[1] / "src/fivefold/parallel_core/planner/machines"


def fit(
    errors: Callable[[Mapping[str, float]], list[float]],
    start: Mapping[str, float],
    bounds: Mapping[str, tuple[float, float]],
) -> dict[str, float]:
    """The constants with the least sum of squares, by Levenberg and Marquardt's steps."""
    names = list(start)
    low, high = np.log([bounds[name] for name in names]).T

    def at(x: Any) -> Any:
        return np.array(errors(dict(zip(names, map(float, np.exp(x)), strict=True))))

    x, damping = np.log(list(start.values())), 1e-2
    found = at(x)
    for _ in range(60):
        slopes = np.stack([(found - at(x - h)) / 1e-4 for h in 1e-4 * np.eye(len(x))], axis=1)
        square = slopes.T @ slopes
        step = np.linalg.solve(square + damping * np.diag(np.diag(square)), -slopes.T @ found)
        tried = np.clip(x + step, low, high)
        new = at(tried)
        better = new @ new < found @ found
        damping *= 0.3 if better else 4
        if better:
            x, found = tried, new
    return {n: float(f"{value:.4g}") for n, value in zip(names, np.exp(x), strict=True)}


def write_constants(machine: str, constants: Mapping[str, float]) -> None:
    """Into the machine's TOML, each on its own line."""
    path = MACHINES / f"{machine}.toml"
    text = path.read_text()
    for name, value in constants.items():
        line = f"{name} = {value}"
        text, count = re.subn(rf"^{name} = .*$", line, text, flags=re.MULTILINE)
        text += "" if count else f"{line}\n"
    atomic_write_text(path, text)
