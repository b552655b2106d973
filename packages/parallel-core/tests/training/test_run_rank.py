"""What one rank of a run does, from the first step to the last."""

import json
from pathlib import Path

import pytest
import torch

from fivefold.parallel_core.checkpoint import Checkpoints
from fivefold.parallel_core.config import override
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.training.metrics import read_jsonl
from fivefold.parallel_core.training.run import LayoutConfig, load_text_run
from fivefold.parallel_core.training.run_rank import (
    check_training,
    checkpoints_of,
    device_of_rank,
    topology_of,
    train_on_text,
)

from .text_runs import ToyRun, toy, trainer_of, written


@pytest.fixture
def run(tmp_path: Path) -> ToyRun:
    return load_text_run(ToyRun, written(tmp_path))


def test_a_rank_alone() -> None:
    topology = topology_of(LayoutConfig())
    assert (topology.layout.world_size, topology.device) == (1, torch.device("cpu"))
    assert device_of_rank() == torch.device("cpu")


def test_a_run_leaves_its_files_and_goes_on(
    run: ToyRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, whole = tmp_path / "run", tmp_path / "whole"
    short = override(run, {"training.steps": "2"})
    assert train_on_text(trainer_of(short, folder), short, folder).step == 2
    assert (folder / "tokenizer" / "tokenizer.json").exists()
    damaged = folder / "checkpoints" / "step-00000002" / "state.json"
    assert train_on_text(trainer_of(run, folder), run, folder).finished
    assert "going on after step 2" in capfd.readouterr().err
    assert json.loads((folder / "run.json").read_text()) == run.to_dict()
    assert train_on_text(trainer_of(run, whole), run, whole).step == 4
    losses = [
        {r["step"]: r["loss"] for r in read_jsonl(at / "metrics.jsonl") if "loss" in r}
        for at in (folder, whole)
    ]
    assert losses[0] == losses[1] and list(losses[0]) == [1, 2, 3, 4]
    figures = [r for r in read_jsonl(whole / "metrics.jsonl") if "loss" in r]
    assert all(r["sequences"] == 2 and r["bits_per_byte"] > 0 for r in figures)
    damaged.write_text("{")
    assert train_on_text(trainer_of(run, folder), run, folder).finished
    assert "the checkpoint after step 2 is damaged" in capfd.readouterr().err


def test_another_text_or_model_is_not_gone_on_with(run: ToyRun, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train_on_text(trainer_of(run, folder), run, folder)
    kept = (folder / "run.json").read_text()
    for change in ({"data.heldout_fraction": "0.5"}, {"model.num_layers": "3"}):
        other = override(run, change)
        with pytest.raises(ConfigError):
            train_on_text(trainer_of(other, folder), other, folder)
    assert (folder / "run.json").read_text() == kept


def test_checkpoints_have_the_run_s_folder_and_retention(run: ToyRun, tmp_path: Path) -> None:
    assert checkpoints_of(None, run.training) is None
    found = checkpoints_of(tmp_path, run.training)
    assert isinstance(found, Checkpoints)
    assert found.path(3).parent == tmp_path / "checkpoints"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.global_batch_size": "3"}, "global_batch_size=3 is not a multiple of dp"),
        ({"training.recompute": "heads"}, "no region 'heads'"),
        ({"training.data_parallel.shard_size": "3"}, "shard_size=3 does not divide the 2 ranks"),
    ],
)
def test_what_cannot_be_trained(run: ToyRun, changes: dict[str, str], message: str) -> None:
    check_training(run.training, Layout(2), lambda: toy(run))
    wrong = override(run, changes)
    with pytest.raises(ConfigError, match=message):
        check_training(wrong.training, Layout(2), lambda: toy(run))
