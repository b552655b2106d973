"""Ranks that hang, stop or die under a layout's groups end the job within a bounded time."""

import os
import signal
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from fivefold.parallel_core.collectives import sum_over
from fivefold.parallel_core.errors import RankError
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.topology import AXES, Topology

RANKS, SICK, TIMEOUT = 4, 2, 2.0
BOUND = TIMEOUT + 13.0  # collectives, what may still be on its way, stacks, the end of the ranks


def test_every_group_gives_up_when_the_world_does() -> None:
    def work() -> list[float]:
        topology = Topology(Layout(8, tp=2, cp=2, ep=2, pp=2))
        groups = [topology.axis(name).group for name in (*AXES, "tp%1")]
        cpu = torch.device("cpu")
        return [g._get_backend(cpu).options._timeout.total_seconds() for g in groups if g]

    for found in launch(work, 8, timeout=120, collective_timeout=77.0):
        assert len(found) > 5 and set(found) == {77.0}


def load_for_ever() -> None:
    while True:
        time.sleep(0.1)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wait_in_another_group() -> None:
    """Be in the wrong collective: the others of this group never come."""
    dist.barrier()


def train(harm: Callable[[], None]) -> None:
    topology = Topology(Layout(RANKS, tp=2))
    for step in range(3):
        if step == 1 and topology.world_rank == SICK:
            harm()
        sum_over(torch.ones(4), topology.axis("tp"))
        sum_over(torch.ones(4), topology.axis("dp"))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (load_for_ever, "in load_for_ever"),
        (stop, f"--- rank {SICK} of {RANKS}\n(it did not answer)"),
        (die, f"rank {SICK} of {RANKS} was killed by signal 9 (SIGKILL)"),
        (wait_in_another_group, "Timed out waiting 2000ms"),
    ],
)
def test_a_rank_that_is_lost_ends_the_job_soon_and_is_told(
    harm: Callable[[], None], words: str
) -> None:
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        launch(train, RANKS, harm, timeout=120, collective_timeout=TIMEOUT)
    assert time.monotonic() - start < BOUND
    assert words in str(caught.value)
