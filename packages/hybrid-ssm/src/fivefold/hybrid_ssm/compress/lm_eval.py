"""Benchmarks of EleutherAI's lm-evaluation-harness as what candidates are chosen by."""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from fivefold.hybrid_ssm.errors import HybridConfigError

# The metric of a task, the better one first: length-normalised accuracy, accuracy, exact match.
_METRICS = ("acc_norm,none", "acc,none", "exact_match,strict-match", "exact_match,none")


def harness(
    tasks: Sequence[str], limit: int | None = None, batch_size: int = 8, device: str = "cpu"
) -> Callable[[Path], float]:
    """A benchmark for ``minipuzzle``: the mean of the tasks' main metric.

    Args:
        tasks: names that the harness knows.
        limit: samples of each task; None for all.
        batch_size: of the harness.
        device: where the model runs.

    Raises:
        HybridConfigError: the harness is not installed.
    """
    try:
        lm_eval = import_module("lm_eval")
    except ModuleNotFoundError:
        raise HybridConfigError(
            "benchmarks need lm-evaluation-harness: pip install 'fivefold-hybrid-ssm[lm-eval]'"
        ) from None

    def score(folder: Path) -> float:
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args=f"pretrained={folder}",
            tasks=list(tasks),
            limit=limit,
            batch_size=batch_size,
            device=device,
        )
        values = [_main(task, found["results"][task]) for task in tasks]
        return sum(values) / len(values)

    return score


def _main(task: str, measured: dict[str, Any]) -> float:
    for metric in _METRICS:
        if metric in measured:
            return float(measured[metric])
    raise HybridConfigError(
        f"task {task!r} of lm-evaluation-harness measures {', '.join(measured)}; one of "
        f"{', '.join(_METRICS)} is needed to compare candidates"
    )
