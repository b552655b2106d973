"""A run under the mapping that the planner finds best: ``fivefold-moe train --plan auto``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fivefold.moe.train import RunConfig, load_run
from fivefold.parallel_core.config import load_toml
from fivefold.parallel_core.planner.auto import as_toml, best_tables, shape_of
from fivefold.parallel_core.planner.hardware import hardware


def load_planned(
    source: Path, overrides: Mapping[str, str], world_size: int, machine: str
) -> tuple[RunConfig, str]:
    """Read a run and give it the fastest mapping that fits the machine's memory.

    Args:
        source: TOML file of the run. Its degrees, microbatch, recomputation, form of data
            parallelism and schedule give way to the planner's.
        overrides: values by dotted key; they have the last word.
        world_size: number of ranks.
        machine: one that the planner knows, or a TOML file.

    Returns:
        The run, and what the planner chose as TOML.

    Raises:
        ConfigError: there is no such machine, or no mapping that is legal and fits; the message has
            the nearest.
    """
    run = load_run(source, overrides)
    found = best_tables(
        shape_of(run.model.to_dict()),
        world_size=world_size,
        length=run.training.sequence_length,
        global_batch=run.training.global_batch_size,
        machine=hardware(machine),
    )
    return load_run(_merged(load_toml(source), found), overrides), as_toml(found)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Tables of ``over`` laid over those of ``base``, key by key."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            value = _merged(below, value)
        merged[key] = value
    return merged
