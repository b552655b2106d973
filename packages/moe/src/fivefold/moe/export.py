"""From a run's checkpoint to a model in Hugging Face form."""

import json
import shutil
from pathlib import Path

import torch

from fivefold.moe.model import MoEForCausalLM
from fivefold.moe.train import RunConfig
from fivefold.parallel_core.checkpoint import Checkpoints, TensorPart, load_parts, read_state
from fivefold.parallel_core.errors import CheckpointError
from fivefold.parallel_core.parameters import ParameterTable
from fivefold.parallel_core.training.run import CHECKPOINTS, RUN_FILE, TOKENIZER


def load_run_model(
    run: Path, step: int | None = None, dtype: torch.dtype | None = None
) -> tuple[MoEForCausalLM, int]:
    """The model of a run, whole, on the CPU, in eval mode.

    Args:
        run: folder of the run.
        step: of the checkpoint; None is the newest whole one.
        dtype: of the parameters; None is the run's.

    Returns:
        The model and the number of steps it was trained for.

    Raises:
        CheckpointError: there is no such run or checkpoint, or it is damaged.
    """
    config = read_run(run)
    path = _checkpoint(run, step)
    with torch.device("meta"):
        model = MoEForCausalLM(config.model).to(config.training.precision.storage_dtype)
    model.to_empty(device="cpu")
    model.tie_weights()
    table = ParameterTable.of(model)
    pieces = [*table.pieces(model), *table.buffers(model)]
    parts = {f"model.{p.name}": TensorPart(p.tensor, p.box, p.shape) for p in pieces}
    load_parts(path, parts)
    if dtype is not None:
        model.to(dtype)
    return model.eval(), read_state(path)["step"]


def read_run(run: Path) -> RunConfig:
    """The resolved configuration that a run was started with.

    Raises:
        CheckpointError: the folder is not one of a run.
    """
    try:
        plain = json.loads((run / RUN_FILE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{run} is not the folder of a run: {error}; `fivefold-moe train --run` makes one"
        ) from None
    return RunConfig.from_dict(plain)


def _checkpoint(run: Path, step: int | None) -> Path:
    checkpoints = Checkpoints(run / CHECKPOINTS)
    steps = checkpoints.steps()
    if step is not None and step not in steps:
        found = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(f"{run} has no checkpoint after step {step}; it has {found}")
    path = checkpoints.latest() if step is None else checkpoints.path(step)
    if path is None:
        raise CheckpointError(f"{run} has no whole checkpoint")
    return path


def export_run(
    run: Path,
    output: Path,
    step: int | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
) -> int:
    """Write the model of a run, with its tokenizer, as transformers has it.

    Args:
        run: folder of the run.
        output: folder to write.
        step: of the checkpoint; None is the newest whole one.
        dtype: of the weights; None is the run's.
        max_shard_size: of one safetensors file.

    Returns:
        The number of steps that the model was trained for.
    """
    model, found = load_run_model(run, step, dtype)
    try:
        # The run's own copy: the file it was made from may have moved since.
        shutil.copytree(run / TOKENIZER, output, dirs_exist_ok=True)
    except (OSError, shutil.Error) as error:
        raise CheckpointError(f"the tokenizer of {run} cannot be copied: {error}") from None
    model.save_pretrained(output, max_shard_size)
    return found
