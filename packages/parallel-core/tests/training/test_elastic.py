"""Ranks that are killed, or asked to stop once or twice: what torchrun and the launcher do."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fivefold.parallel_core.checkpoint import Checkpoints
from fivefold.parallel_core.commands import INTERRUPTED
from fivefold.parallel_core.launcher import launch

from . import elastic_job, test_loop
from .elastic_job import EVERY, STEPS
from .test_loop import Outcome

LONG = 200.0  # seconds; only ends what hangs


def torchrun(folder: Path, mishap: str, *, restarts: int) -> "subprocess.CompletedProcess[str]":
    """Run the job in two ranks until torchrun ends."""
    options = ["--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    words = ["-m", "torch.distributed.run", *options, "--monitor-interval=0.1"]
    return subprocess.run(
        [sys.executable, *words, elastic_job.__file__, str(folder), mishap],
        capture_output=True,
        text=True,
        timeout=LONG,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def train_on(folder: Path) -> tuple[int, Outcome, dict[str, Tensor]]:
    """The same run as a rank of the launcher: where it began, how it ended, with what."""
    trainer = elastic_job.make(test_loop, folder, {})
    return trainer.resume(), trainer.fit(), test_loop.end(trainer)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """What each rank ends with where nothing happens."""
    ranks = launch(train_on, 2, tmp_path_factory.mktemp("unbroken"), timeout=LONG)
    assert [(start, outcome.step) for start, outcome, _ in ranks] == [(0, STEPS)] * 2
    return [values for _, _, values in ranks]


def same(found: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]]) -> bool:
    """Whether every rank has the same bits."""
    return all(
        mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
        for mine, theirs in zip(found, wanted, strict=True)
    )


def test_a_killed_rank_makes_torchrun_go_on_from_the_last_checkpoint(
    tmp_path: Path, unbroken: list[dict[str, Tensor]]
) -> None:
    run = torchrun(tmp_path, "killed", restarts=1)
    assert run.returncode == 0, run.stderr
    starts = {path.name: int(path.read_text()) for path in tmp_path.glob("start-*")}
    assert starts == {"start-0-0": 0, "start-0-1": 0, "start-1-0": 4, "start-1-1": 4}
    assert same([torch.load(tmp_path / f"end-{rank}.pt") for rank in range(2)], unbroken)
    assert Checkpoints(tmp_path / "checkpoints").steps() == [2, 4, 6]


def test_sigterm_to_torchrun_saves_also_where_another_comes_within_the_save(
    tmp_path: Path, unbroken: list[dict[str, Tensor]]
) -> None:
    run = torchrun(tmp_path, "stopped", restarts=1)
    assert run.returncode != 0
    assert [int((tmp_path / f"status-{rank}").read_text()) for rank in range(2)] == [
        INTERRUPTED
    ] * 2, run.stderr
    saved = Checkpoints(tmp_path / "checkpoints")
    last = saved.steps()[-1]
    assert 3 <= last < STEPS and saved.damaged() == {}
    assert not (tmp_path / "start-1-0").exists(), "a run that was asked to stop is not restarted"
    ranks = launch(train_on, 2, tmp_path, timeout=LONG)
    assert [start for start, _, _ in ranks] == [last] * 2
    assert same([values for _, _, values in ranks], unbroken)


def ask_to_stop() -> None:
    os.kill(os.getppid(), signal.SIGTERM)


def ask_again() -> None:
    """A second time, which the launcher does not take for the first; then it kills this rank."""
    time.sleep(0.5)
    ask_to_stop()
    time.sleep(LONG)


def train_until_asked(folder: Path, twice: bool) -> Outcome:
    interrupt = {2: ask_to_stop} if dist.get_rank() == 1 else {}
    trainer = elastic_job.make(test_loop, folder, interrupt)
    trainer.resume()
    if twice:
        train_step = trainer.train_step

        def then_asked_again() -> bool:
            if stop := train_step():
                elastic_job.signal_in_a_save(trainer, ask_again)
            return stop

        trainer.train_step = then_asked_again
    return trainer.fit()


def launched(folder: Path, twice: bool) -> list[Outcome] | int | str | None:
    """The outcomes, or the status with which the launching process ends."""
    try:
        return launch(train_until_asked, 2, folder, twice, timeout=LONG)
    except SystemExit as stop:
        return stop.code


def test_sigterm_to_the_launcher_saves_and_the_ranks_return(
    tmp_path: Path, unbroken: list[dict[str, Tensor]]
) -> None:
    (outcomes,) = launch(launched, 1, tmp_path, False, init=False, timeout=LONG)
    assert isinstance(outcomes, list) and len(outcomes) == 2
    assert outcomes[0] == outcomes[1] and not outcomes[0].finished
    saved = Checkpoints(tmp_path / "checkpoints")
    assert saved.steps()[-1] == outcomes[0].step >= 3
    ranks = launch(train_on, 2, tmp_path, timeout=LONG)
    assert [start for start, _, _ in ranks] == [outcomes[0].step] * 2
    assert same([values for _, _, values in ranks], unbroken)


def test_a_second_sigterm_to_the_launcher_within_the_save_corrupts_nothing(
    tmp_path: Path, unbroken: list[dict[str, Tensor]]
) -> None:
    assert launch(launched, 1, tmp_path, True, init=False, timeout=LONG) == [128 + signal.SIGTERM]
    saved = Checkpoints(tmp_path / "checkpoints")
    whole = saved.steps()
    assert saved.damaged() == {} and whole and all(step % EVERY == 0 for step in whole)
    assert list(saved.folder.glob("step-*.partial")), "it was killed within the save"
    ranks = launch(train_on, 2, tmp_path, timeout=LONG)
    assert [start for start, _, _ in ranks] == [whole[-1]] * 2
    assert same([values for _, _, values in ranks], unbroken)
