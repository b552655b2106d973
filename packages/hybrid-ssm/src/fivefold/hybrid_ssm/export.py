"""From a run's checkpoint to a model in Hugging Face form."""

from pathlib import Path

import torch

from fivefold.hybrid_ssm.model import HybridForCausalLM
from fivefold.hybrid_ssm.train import RunConfig
from fivefold.parallel_core.training import run_export


def load_run_model(
    run: Path, step: int | None = None, dtype: torch.dtype | None = None
) -> tuple[HybridForCausalLM, int]:
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
    return run_export.load_model(
        run_export.checkpoint_of(run, step),
        lambda: HybridForCausalLM(config.model),
        config.training.precision.storage_dtype,
        dtype,
    )


def read_run(run: Path) -> RunConfig:
    """The resolved configuration that a run was started with.

    Raises:
        CheckpointError: the folder is not one of a run.
    """
    return run_export.read_run(run, RunConfig, "fivefold-hybrid-ssm")


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
    run_export.write_model(model, run, output, max_shard_size)
    return found
