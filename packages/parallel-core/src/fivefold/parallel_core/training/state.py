"""What of a run goes into a checkpoint beside the tensors, and how it is checked when resuming."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fivefold.parallel_core.box import Box
from fivefold.parallel_core.checkpoint import Checkpoints, TensorPart, load_parts, read_state
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.rng import seed_ranks
from fivefold.parallel_core.topology import Topology


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is.

    Attributes:
        step: finished steps, which is also the place in the data.
        skipped: those of them whose gradient was not finite, so that nothing was updated.
        heldout_loss: after the last of them, where it was evaluated then.
    """

    step: int = 0
    skipped: int = 0
    heldout_loss: float | None = None


def save_state(
    checkpoints: Checkpoints,
    progress: Progress,
    parts: Mapping[str, TensorPart],
    identity: Mapping[str, Any],
    topology: Topology,
    *,
    in_background: bool = False,
) -> Path:
    """Save a run; all ranks together. The random state of each rank is saved with it.

    Args:
        checkpoints: of the run.
        progress: how far it is.
        parts: all that training changes.
        identity: what a resumed run must share.
        topology: the ranks.
        in_background: return when the values are copied.

    Returns:
        Where the checkpoint is or will be.
    """
    state = {
        "identity": dict(identity),
        "layout": topology.layout.to_dict(),
        "skipped": progress.skipped,
        "heldout_loss": progress.heldout_loss,
        "torch": torch.__version__,
    }
    save = checkpoints.start if in_background else checkpoints.save
    save(progress.step, {**parts, **_random_state(topology)}, state)
    return checkpoints.path(progress.step)


def load_state(
    path: Path,
    parts: Mapping[str, TensorPart],
    identity: Mapping[str, Any],
    topology: Topology,
) -> Progress:
    """Fill ``parts`` from a checkpoint of the same run, of any layout; all ranks together.

    Random state is a rank's own and is restored where the layout is the one that was saved; under
    another layout the ranks are seeded anew, from the step.

    Returns:
        How far the run was.

    Raises:
        ConfigError: the checkpoint is of a run with other data or batches.
        CheckpointError: it is damaged or does not fit.
    """
    state = read_state(path)
    _check_identity(path, state["identity"], identity)
    same = state["layout"] == topology.layout.to_dict()
    random = _random_state(topology) if same else {}
    load_parts(path, {**parts, **random})
    for part in random.values():
        torch.set_rng_state(part.tensor)
    if not same:
        seed_ranks(topology, state["step"])
    # Checkpoints of releases that stopped instead of skipping have no such number.
    return Progress(state["step"], state.get("skipped", 0), state.get("heldout_loss"))


def _check_identity(path: Path, saved: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    asked = json.loads(json.dumps(dict(asked)))  # as it was when it was saved: tuples as lists
    differing = [key for key, value in asked.items() if saved.get(key) != value]
    if differing:
        raise ConfigError(
            f"{path} is of a run with {_listed(saved, differing)}, this one has "
            f"{_listed(asked, differing)}; resume with the same values, or train into another "
            "folder"
        )


def _listed(values: Mapping[str, Any], keys: list[str]) -> str:
    shown = {key: str(values.get(key)) for key in keys}
    # A fingerprint says that texts differ, not how; its start is enough to tell two apart.
    return ", ".join(f"{k}={v if len(v) < 40 else v[:12] + '...'}" for k, v in shown.items())


def _random_state(topology: Topology) -> dict[str, TensorPart]:
    state = torch.get_rng_state()
    shape = tuple(state.shape)
    return {f"random.{topology.world_rank}": TensorPart(state, Box.whole(shape), shape)}
