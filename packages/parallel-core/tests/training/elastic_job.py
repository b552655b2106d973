"""What torchrun starts in test_elastic: the small training run of test_loop, with a mishap.

``python elastic_job.py FOLDER MISHAP``; beside the checkpoints it leaves what each rank resumed
from, ended with, and its exit status.
"""

import os
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from fivefold.parallel_core.commands import INTERRUPTED
from fivefold.parallel_core.launcher import connect, disconnect
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.topology import Topology

STEPS, EVERY = 6, 2


def suite() -> ModuleType:
    """The module test_loop, by a name that does not depend on where the tests lie."""
    package = ModuleType("suite")
    package.__path__ = [str(Path(__file__).parents[1])]
    sys.modules["suite"] = package
    return import_module("suite.training.test_loop")


def make(loop: Any, folder: Path, interrupt: dict[int, Callable[[], None]]) -> Any:
    """The trainer of both ranks, which saves after every second step."""
    return loop.make_trainer(
        Topology(Layout(2, pp=2)),
        folder=folder / "checkpoints",
        steps=STEPS,
        checkpoint_every=EVERY,
        interrupt=interrupt,
    )[0]


def mishaps(name: str) -> dict[int, Callable[[], None]]:
    """What befalls this rank before a step (from 0)."""
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0" and dist.get_rank() == 1
    if name == "killed" and first:
        return {5: lambda: os.kill(os.getpid(), signal.SIGKILL)}
    if name == "stopped" and first:
        return {2: lambda: os.kill(os.getppid(), signal.SIGTERM)}
    return {}


def signal_in_a_save(trainer: Any, act: Callable[[], None]) -> None:
    """Let rank 0 be interrupted once more when all is written but nothing has its name yet."""
    finish = trainer.checkpoints._finish

    def interrupted(*args: Any) -> None:
        act()
        finish(*args)

    if dist.get_rank() == 0:
        trainer.checkpoints._finish = interrupted


def main(folder: Path, mishap: str) -> int:
    """Train, and tell of it in files."""
    rank, _ = connect(device_type="cpu")
    loop = suite()
    trainer = make(loop, folder, mishaps(mishap))
    start = trainer.resume()
    life = os.environ["TORCHELASTIC_RESTART_COUNT"]
    (folder / f"start-{life}-{rank}").write_text(str(start))
    if mishap == "stopped":
        signal_in_a_save(trainer, lambda: os.kill(os.getpid(), signal.SIGTERM))
    outcome = trainer.fit()
    torch.save(loop.end(trainer), folder / f"end-{rank}.pt")
    disconnect()
    status = 0 if outcome.finished else INTERRUPTED
    (folder / f"status-{rank}").write_text(str(status))
    return status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
