"""From a run's checkpoint to its model, whole, and to a folder in Hugging Face form."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from fivefold.parallel_core.checkpoint import Checkpoints, TensorPart, load_parts, read_state
from fivefold.parallel_core.config import Config
from fivefold.parallel_core.errors import CheckpointError
from fivefold.parallel_core.parameters import ParameterTable
from fivefold.parallel_core.training.run import CHECKPOINTS, RUN_FILE, TOKENIZER

_C = TypeVar("_C", bound=Config)
_M = TypeVar("_M", bound=nn.Module)


class Saves(Protocol):
    """A model that writes itself as transformers does."""

    def save_pretrained(self, folder: str | Path, max_shard_size: int | str = "5GB") -> None:
        """Write a folder."""


def read_run(run: Path, kind: type[_C], command: str) -> _C:
    """The resolved configuration that a run was started with.

    Args:
        run: folder of the run.
        kind: of its configuration.
        command: that makes such folders, for the message.

    Raises:
        CheckpointError: the folder is not one of a run.
    """
    try:
        plain = json.loads((run / RUN_FILE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{run} is not the folder of a run: {error}; `{command} train --run` makes one"
        ) from None
    return kind.from_dict(plain)


def checkpoint_of(run: Path, step: int | None = None) -> Path:
    """The folder of a run's checkpoint.

    Args:
        run: folder of the run.
        step: after which it was written; None is the newest whole one.

    Raises:
        CheckpointError: there is none.
    """
    checkpoints = Checkpoints(run / CHECKPOINTS)
    steps = checkpoints.steps()
    if step is not None and step not in steps:
        found = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(f"{run} has no checkpoint after step {step}; it has {found}")
    path = checkpoints.latest() if step is None else checkpoints.path(step)
    if path is None:
        raise CheckpointError(f"{run} has no whole checkpoint")
    return path


def load_model(
    checkpoint: Path,
    make_model: Callable[[], _M],
    storage: torch.dtype,
    dtype: torch.dtype | None = None,
) -> tuple[_M, int]:
    """The model of a checkpoint, whole, on the CPU, in eval mode.

    Args:
        checkpoint: its folder.
        make_model: makes the model, without memory; it may have ``tie_weights``.
        storage: dtype of the parameters in the run.
        dtype: of the parameters that come back; None is ``storage``.

    Returns:
        The model and the number of steps it was trained for.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another model.
    """
    with torch.device("meta"):
        model = make_model().to(storage)
    model.to_empty(device="cpu")
    tie: Callable[[], Any] = getattr(model, "tie_weights", lambda: None)
    tie()
    table = ParameterTable.of(model)
    pieces = [*table.pieces(model), *table.buffers(model)]
    load_parts(
        checkpoint, {f"model.{p.name}": TensorPart(p.tensor, p.box, p.shape) for p in pieces}
    )
    if dtype is not None:
        model.to(dtype)
    return model.eval(), read_state(checkpoint)["step"]


def write_model(model: Saves, run: Path, output: Path, max_shard_size: int | str = "5GB") -> None:
    """Write the model of a run, with the run's tokenizer, as transformers has it.

    Args:
        model: of the run.
        run: folder of the run.
        output: folder to write.
        max_shard_size: of one safetensors file.

    Raises:
        CheckpointError: the tokenizer cannot be copied.
    """
    try:
        # The run's own copy: the file it was made from may have moved since.
        shutil.copytree(run / TOKENIZER, output, dirs_exist_ok=True)
    except (OSError, shutil.Error) as error:
        raise CheckpointError(f"the tokenizer of {run} cannot be copied: {error}") from None
    model.save_pretrained(output, max_shard_size)
