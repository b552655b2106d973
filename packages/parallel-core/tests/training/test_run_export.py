"""From a run's folder to its model."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from fivefold.parallel_core.errors import CheckpointError
from fivefold.parallel_core.training.run import load_text_run
from fivefold.parallel_core.training.run_export import (
    checkpoint_of,
    load_model,
    read_run,
    write_model,
)
from fivefold.parallel_core.training.run_rank import train_on_text

from ..toy import Toy
from .text_runs import ToyRun, toy, trainer_of, written


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[ToyRun, Path, Toy]:
    """A run, its folder, and the model in memory after the last step."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    run = load_text_run(ToyRun, written(folder))
    trainer = trainer_of(run, folder)
    train_on_text(trainer, run, folder)
    model = trainer.model.parts[0]
    assert isinstance(model, Toy)
    return run, folder, model


def test_the_model_is_the_one_that_was_trained(finished: tuple[ToyRun, Path, Toy]) -> None:
    run, folder, trained = finished
    assert read_run(folder, ToyRun, "fivefold-x") == run
    model, step = load_model(checkpoint_of(folder), lambda: toy(run), torch.float32)
    assert step == 4 and not model.training
    found, wanted = dict(model.named_parameters()), dict(trained.named_parameters())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    narrow, step = load_model(
        checkpoint_of(folder, 2), lambda: toy(run), torch.float32, torch.bfloat16
    )
    assert step == 2
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}


def test_what_is_no_run(finished: tuple[ToyRun, Path, Toy], tmp_path: Path) -> None:
    _, folder, _ = finished
    with pytest.raises(CheckpointError, match=r"is not the folder of .*`fivefold-x train --run` m"):
        read_run(tmp_path, ToyRun, "fivefold-x")
    with pytest.raises(CheckpointError, match=r"no checkpoint after step 3; it has 2, 4$"):
        checkpoint_of(folder, 3)
    with pytest.raises(CheckpointError, match="has no whole checkpoint"):
        checkpoint_of(tmp_path)


def test_a_model_is_written_with_the_run_s_tokenizer(
    finished: tuple[ToyRun, Path, Toy], tmp_path: Path
) -> None:
    class Model:
        def save_pretrained(self, folder: str | Path, max_shard_size: int | str = "5GB") -> None:
            (Path(folder) / "weights").write_text(str(max_shard_size))

    copy = Path(shutil.copytree(finished[1], tmp_path / "run"))
    output = tmp_path / "model"
    write_model(Model(), copy, output, "1MB")
    assert (output / "weights").read_text() == "1MB"
    assert json.loads((output / "tokenizer_config.json").read_text())
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(CheckpointError, match=r"the tokenizer of .* cannot be copied"):
        write_model(Model(), copy, output)
