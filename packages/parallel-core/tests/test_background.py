"""Work in the background: one at a time, values and errors not lost, ends waited for."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fivefold.parallel_core.background import Background, wait_for_all
from fivefold.parallel_core.errors import CheckpointError, RankError
from fivefold.parallel_core.launcher import disconnect, launch


def test_a_second_piece_of_work_waits_for_the_first() -> None:
    background, gate, done = Background("test"), threading.Event(), []
    background.start(lambda: (gate.wait(60), done.append(1)))
    assert background.is_busy and not background.has_failed and done == []
    threading.Timer(0.1, gate.set).start()
    background.start(lambda: done.append(2))
    assert done[0] == 1
    background.wait()
    assert done == [1, 2] and not background.is_busy


def fail() -> None:
    raise CheckpointError("the disk is full")


def test_an_error_is_raised_once_where_it_is_waited_for() -> None:
    background, done = Background("test"), []
    background.start(fail)
    with pytest.raises(CheckpointError, match=r"^the disk is full$"):
        background.start(lambda: done.append(1))
    background.wait()
    assert done == [], "what was asked for after an error is not done unseen"
    background.start(fail)
    while background.is_busy:
        time.sleep(0.01)
    assert background.has_failed
    for leave in (wait_for_all, background.wait):
        if leave is wait_for_all:
            with pytest.raises(CheckpointError):
                leave()
        else:
            leave()
    assert not background.has_failed


def test_leaving_a_job_waits() -> None:
    background, done = Background("test"), []
    background.start(lambda: (time.sleep(0.2), done.append(1)))
    disconnect()
    assert done == [1]


def test_a_rank_of_launch_waits_and_fails_by_name(tmp_path: Path) -> None:
    def work(name: str) -> None:
        background = Background("test")
        background.start(lambda: (time.sleep(0.2), (tmp_path / name).touch()))

    def bad() -> None:
        Background("test").start(fail)

    launch(work, 1, "done", init=False, timeout=60)
    assert (tmp_path / "done").exists()
    with pytest.raises(RankError, match="CheckpointError: the disk is full"):
        launch(bad, 1, init=False, timeout=60)


SCRIPT = """
import time
from fivefold.parallel_core.background import Background
Background("test").start(lambda: (time.sleep(0.3), print("written")))
"""


def test_the_end_of_the_process_waits() -> None:
    found = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert (found.stdout, found.returncode) == ("written\n", 0)
