"""The loop of any model: it ends at its goal and a run that has ended does not go on."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fivefold.parallel_core.build import ParallelModel
from fivefold.parallel_core.checkpoint import Checkpoints
from fivefold.parallel_core.parameters import ParameterTable
from fivefold.parallel_core.topology import Topology
from fivefold.parallel_core.training.base_loop import Loop
from fivefold.parallel_core.training.loop_config import LoopConfig
from fivefold.parallel_core.training.optimizer import AdamWConfig
from fivefold.parallel_core.training.schedule import WarmupCosine
from fivefold.parallel_core.training.state import Progress

STEPS, GOAL = 9, 4


class Descent(Loop):
    """Brings a vector of ones to zero; its goal is a step."""

    def backward(self) -> dict[str, Tensor]:
        (piece,) = self.pieces
        piece.parameter.grad = 2 * piece.parameter.detach()
        return {"loss": piece.parameter.detach().square().sum()}

    def describe(self, sums: Mapping[str, Tensor], seconds: float) -> dict[str, float]:
        return {"loss": float(sums["loss"])}

    def evaluate(self) -> float | None:
        self.reached = self.step >= GOAL
        self._keep_heldout_loss(1 / self.step)
        return self.heldout_loss

    def resumed(self, progress: Progress) -> None:
        self.reached = progress.heldout_loss is not None and progress.heldout_loss <= 1 / GOAL


def descent(folder: Path) -> Descent:
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
    model = ParallelModel([module], ParameterTable.of(module), Topology.local())
    config = LoopConfig(
        steps=STEPS,
        global_batch_size=1,
        evaluate_every=2,
        optimizer=AdamWConfig(weight_decay=0.0),
        schedule=WarmupCosine(learning_rate=0.1, total_steps=STEPS, kind="constant"),
    )
    return Descent(config, model, checkpoints=Checkpoints(folder))


def test_a_run_ends_at_its_goal_with_a_checkpoint(tmp_path: Path) -> None:
    loop, told = descent(tmp_path), []
    loop.report = lambda step, measured: told.append((step, measured.get("loss")))
    outcome = loop.fit()
    assert (outcome.step, outcome.finished, outcome.heldout_loss) == (GOAL, True, 1 / GOAL)
    losses = [loss for _, loss in told if loss is not None]
    assert len(losses) == GOAL and losses == sorted(losses, reverse=True)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"step-{GOAL:08d}"]


def test_a_run_that_reached_its_goal_does_not_go_on(tmp_path: Path) -> None:
    descent(tmp_path).fit()
    again = descent(tmp_path)
    assert again.resume() == GOAL
    outcome = again.fit()
    assert (outcome.step, outcome.finished) == (GOAL, True)
