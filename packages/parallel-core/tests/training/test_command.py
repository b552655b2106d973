"""The verb ``train``: what it does before ranks are started, and how it ends."""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path

import pytest

from fivefold.parallel_core.arguments import add_train
from fivefold.parallel_core.errors import ConfigError, LayoutError, RankError
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.training import command
from fivefold.parallel_core.training.command import TrainCommand, conclude
from fivefold.parallel_core.training.ends import Outcome


class OursError(Exception):
    """What the package of the command raises."""


def load(path: Path, overrides: Mapping[str, str]) -> dict[str, str]:
    return {"file": path.name, **overrides}


def check(config: dict[str, str], world_size: int) -> Layout:
    if config.get("model") == "wrong":
        raise OursError("a wrong model")
    return Layout(world_size, tp=int(config.get("tp", "1")))


def describe(config: dict[str, str], layout: Layout) -> None:
    print(f"{config['file']} on {layout.world_size} ranks, tp={layout.tp}")


def train_rank(config: dict[str, str], folder: Path, tensorboard: bool) -> Outcome:
    (folder / "trained").write_text(f"{sorted(config)} {tensorboard}")
    return Outcome(5, True, None)


TRAIN = TrainCommand(
    load=load, check=check, describe=describe, train_rank=train_rank, expected=(OursError,)
)


def options(*words: str) -> Namespace:
    parser = ArgumentParser()
    add_train(parser, module="here", default_run="runs/default")
    return parser.parse_args(["--config", "run.toml", *words])


def torchrun(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> list[str]:
    """Be a rank of torchrun; what was done with the process group."""
    did: list[str] = []
    monkeypatch.setattr(command, "under_torchrun", lambda: True)
    monkeypatch.setattr(command, "place", lambda: (rank, world_size))
    monkeypatch.setattr(command, "connect", lambda: did.append("connect"))
    monkeypatch.setattr(command, "disconnect", lambda: did.append("disconnect"))
    return did


def test_ranks_are_forked_and_the_end_is_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ("--run", str(tmp_path), "--nproc", "2", "--set", "tp=2", "--tensorboard")
    assert TRAIN(options(*words)) == 0
    assert (tmp_path / "trained").read_text() == "['file', 'tp'] True"
    assert capfd.readouterr().out.splitlines() == [
        "run.toml on 2 ranks, tp=2",
        f"finished 5 steps; metrics, loss curve and checkpoints are in {tmp_path}",
    ]


def test_dry_runs_start_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "launch", None)
    assert TRAIN(options("--run", str(tmp_path), "--dry-run")) == 0
    assert capsys.readouterr().out == "run.toml on 1 ranks, tp=1\n"
    did = torchrun(monkeypatch, 0, 2)
    assert TRAIN(options("--run", str(tmp_path), "--dry-run")) == 0
    assert did == ["connect", "disconnect"]
    assert not list(tmp_path.iterdir())


def test_an_illegal_layout_is_one_line_that_names_the_option(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "launch", None)
    with pytest.raises(LayoutError, match=r"world_size 3 is not .*--nproc\)$") as caught:
        TRAIN(options("--nproc", "3", "--set", "tp=2"))
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ConfigError, match="--set 'tp'; write KEY=VALUE"):
        TRAIN(options("--set", "tp"))


def test_an_error_of_a_rank_is_raised(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="rank 0 of 1 failed: FileNotFoundError"):
        TRAIN(options("--run", str(tmp_path / "nowhere")))


@pytest.mark.parametrize(("rank", "lines"), [(0, 2), (1, 0)])
@pytest.mark.parametrize(("finished", "status"), [(True, 0), (False, 130)])
def test_all_ranks_of_torchrun_end_alike(
    rank: int,
    lines: int,
    finished: bool,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    did = torchrun(monkeypatch, rank, 2)
    train = TrainCommand(
        load=load,
        check=check,
        describe=describe,
        train_rank=lambda *_: Outcome(3, finished, None),
    )
    assert train(options()) == status
    assert did == ["connect", "disconnect"]
    assert len(capsys.readouterr().out.splitlines()) == lines


@pytest.mark.parametrize("wrong", ["model=wrong", "tp=2"])
def test_one_rank_of_torchrun_says_what_is_wrong_before_they_meet(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    did = torchrun(monkeypatch, 0, 3)
    with pytest.raises((OursError, LayoutError)):
        TRAIN(options("--set", wrong))
    torchrun(monkeypatch, 1, 3)
    assert TRAIN(options("--set", wrong)) == 1
    assert did == []


def test_nproc_is_not_for_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    torchrun(monkeypatch, 0, 1)
    with pytest.raises(ConfigError, match="torchrun has started them already: leave it out"):
        TRAIN(options("--nproc", "2"))


def test_what_is_stopped_can_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert conclude(Outcome(7, False, None), tmp_path) == 130
    said = capsys.readouterr().out
    assert said == "stopped after step 7; run the same command again to go on\n"
