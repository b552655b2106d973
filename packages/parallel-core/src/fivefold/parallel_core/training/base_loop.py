"""The training loop of any model: gradients and scores in, finished steps and checkpoints out."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fivefold.parallel_core.build import ParallelModel
from fivefold.parallel_core.checkpoint import Checkpoints, TensorPart
from fivefold.parallel_core.errors import CheckpointError, ConfigError, ParallelError
from fivefold.parallel_core.gradients import clip, global_norm, sum_partial
from fivefold.parallel_core.rng import seed_ranks
from fivefold.parallel_core.training.ends import Outcome, Report
from fivefold.parallel_core.training.loop_config import LoopConfig
from fivefold.parallel_core.training.optimizer import TORCH_ADAMW, MakeAdamW, ShardedAdamW
from fivefold.parallel_core.training.state import Progress, load_state, save_state
from fivefold.parallel_core.training.stopping import StopRequest
from fivefold.parallel_core.training.totals import Totals


class Loop(ABC):
    """Steps, checkpoints, resuming and ends of a run; what a step learns from is the subclass's.

    Every rank makes one and calls the same methods.

    Attributes:
        step: finished steps.
        skipped: those of them whose gradient was not finite.
        heldout_loss: of the last evaluation.
        reached: whether an evaluation found what training is for; it then ends.
        report: called on rank 0 after each step and evaluation; None tells nobody.

    Args:
        config: the run.
        model: this rank's part, with values.
        checkpoints: where to save; None saves nothing.
        identity: plain data that a resumed run must share (the data's fingerprint, say).
        make_optimizer: torch's AdamW, or one that computes the same in another way.
    """

    def __init__(
        self,
        config: LoopConfig,
        model: ParallelModel,
        *,
        checkpoints: Checkpoints | None = None,
        identity: Mapping[str, Any] | None = None,
        make_optimizer: MakeAdamW = TORCH_ADAMW,
    ):
        self.config: LoopConfig = config
        self.model, self.checkpoints = model, checkpoints
        self.topology = model.topology
        seed_ranks(self.topology, config.seed)
        self.pieces = model.pieces()
        self.optimizer = ShardedAdamW(self.pieces, config.optimizer, make_optimizer)
        self.step = self.skipped = self._skipped_in_a_row = 0
        self.heldout_loss: float | None = None
        self.reached = False
        self._evaluated = -1
        # What decides which samples a step sees; a resumed run must agree on it.
        self.identity = {"seed": config.seed, **(identity or {})}
        self.report: Report | None = None
        self._totals = Totals(self.topology.world)
        self._stop = StopRequest()

    @abstractmethod
    def backward(self) -> dict[str, Tensor]:
        """Leave the gradients of this step in the parameters.

        Returns:
            What is to be summed over the ranks; the same names in every step.
        """

    @abstractmethod
    def describe(self, sums: Mapping[str, Tensor], seconds: float) -> dict[str, float]:
        """What to tell of a step.

        Args:
            sums: of what ``backward`` returned, over all ranks.
            seconds: that the step took.
        """

    @abstractmethod
    def evaluate(self) -> float | None:
        """Score the model, keep and report the result; None where there is nothing to score on."""

    def sum_gradients(self) -> None:
        """Sum what ``backward`` left over the axes on which it is a part of the gradient."""
        sum_partial(self.pieces, self.topology)

    def after_update(self, sums: Mapping[str, Tensor]) -> None:
        """What follows an update of the parameters."""
        self.model.after_step(sums)

    def resume(self) -> int:
        """Go on from the newest whole checkpoint, if there is one, whatever layout wrote it.

        Returns:
            Finished steps.

        Raises:
            ConfigError: it is of a run with another model, data or batches, or of more steps.
            CheckpointError: it does not fit the model, or none of those there is whole.
        """
        newest = self.checkpoints.latest(contents=True) if self.checkpoints else None
        if newest is not None:
            progress = load_state(newest, self.parts(), self.identity, self.topology)
            self.step, self.skipped = progress.step, progress.skipped
            self.optimizer.set_steps(self.step - self.skipped)
            self.resumed(progress)
        if self.step > self.config.steps:
            raise ConfigError(
                f"{newest} is after step {self.step}, but training ends at steps="
                f"{self.config.steps}; ask for at least {self.step} steps, or train into another "
                "folder"
            )
        return self.step

    def resumed(self, progress: Progress) -> None:  # noqa: B027
        """What else is to be taken up of a run that goes on; nothing by default."""

    def save(self, *, in_background: bool = False) -> None:
        """Write a checkpoint of the finished steps; in the background from a copy of them.

        Raises:
            CheckpointError: it cannot be written, or the one before in the background could not.
        """
        if self.checkpoints is not None:
            save_state(
                self.checkpoints,
                Progress(self.step, self.skipped, self._loss_of_this_step()),
                self.parts(),
                self.identity,
                self.topology,
                in_background=in_background,
            )

    def _loss_of_this_step(self) -> float | None:
        return self.heldout_loss if self._evaluated == self.step else None

    def parts(self) -> dict[str, TensorPart]:
        """All that training changes, by name: parameters, buffers and optimizer moments."""
        parameters = {
            f"model.{piece.name}": TensorPart(piece.tensor, piece.box, piece.shape)
            for piece in (*self.pieces, *self.model.buffers())
        }
        return parameters | self.optimizer.parts()

    def fit(self) -> Outcome:
        """Train until the last step or the goal, or until SIGTERM or Ctrl-C asks to stop; saves.

        Raises:
            CheckpointError: a checkpoint cannot be written, in the background or not.
        """
        with self._stop.heard(), self._saved_in_the_end():
            while self.step < self.config.steps and not self.reached:
                stop = self.train_step()
                last = self.step == self.config.steps
                if self._due(self.config.evaluate_every, last):
                    self.evaluate()
                stop = stop or self.reached
                if stop or last or self.step % self.config.checkpoint_every == 0:
                    self.save(in_background=self.config.checkpoint_in_background)
                if stop:
                    break
        if self.step == self.config.steps and self.heldout_loss is None:
            self.evaluate()
        finished = self.reached or self.step == self.config.steps
        return Outcome(self.step, finished, self.heldout_loss)

    @contextmanager
    def _saved_in_the_end(self) -> Iterator[None]:
        """Wait, however the block ends, for the checkpoint that is being written."""
        try:
            yield
        except BaseException as error:
            try:
                self._wait_for_checkpoint()
            except CheckpointError as unsaved:
                error.add_note(str(unsaved))
            raise
        self._wait_for_checkpoint()

    def _wait_for_checkpoint(self) -> None:
        if self.checkpoints is not None:
            self.checkpoints.wait()

    def _keep_heldout_loss(self, loss: float) -> None:
        """Take the result of an evaluation of this step."""
        self.heldout_loss, self._evaluated = loss, self.step

    def _due(self, every: int | None, last: bool) -> bool:
        return last or (every is not None and self.step % every == 0)

    def train_step(self) -> bool:
        """One optimizer step; returns whether any rank was asked to stop."""
        start = time.perf_counter()
        self.model.train()
        mine = self.backward()
        norm, learning_rate = self._update()
        sums = self._sum_totals(mine)
        stop = bool(sums.pop("stop") > 0)
        if sums.pop("unsaved") > 0:
            self._wait_for_checkpoint()  # raises, on all ranks in the same step
        if math.isfinite(norm):
            self.after_update(sums)
        seconds = time.perf_counter() - start
        self._tell(
            {
                **self.describe(sums, seconds),
                "grad_norm": norm,
                "learning_rate": learning_rate,
                **({"skipped_steps": self.skipped} if self.skipped else {}),
                "seconds": seconds,
            }
        )
        return stop

    def _update(self) -> tuple[float, float]:
        """Reduce and clip the gradients and step; their norm before, and the learning rate."""
        self.sum_gradients()
        norm = global_norm(self.pieces, self.topology)
        learning_rate = self.config.schedule.rate(self.step)
        if torch.isfinite(norm):
            if self.config.gradient_clip is not None:
                clip(self.pieces, norm, self.config.gradient_clip)
            self.optimizer.step(learning_rate)
            self._skipped_in_a_row = 0
        else:
            self._skip(float(norm))
        self.step += 1
        return float(norm), learning_rate

    def _skip(self, norm: float) -> None:
        """Let go of gradients that are not finite; the norm is the same on all ranks."""
        if self._skipped_in_a_row == self.config.skip_nonfinite:
            raise ParallelError(
                f"step {self.step + 1}: the norm of the gradient is {norm}, after "
                f"{self._skipped_in_a_row} skipped steps in a row (skip_nonfinite="
                f"{self.config.skip_nonfinite}); training stops before this step changes anything. "
                "Lower the learning rate, clip more, or look at the data, and run again: it goes "
                "on from the newest checkpoint"
            )
        for piece in self.pieces:
            piece.parameter.grad = None
        self.skipped += 1
        self._skipped_in_a_row += 1

    def _sum_totals(self, mine: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Over all ranks: what ``backward`` returned, and who must stop and why."""
        device = self.topology.device
        return self._totals.sum(
            {
                **mine,
                "stop": torch.tensor(float(self._stop.asked), device=device),
                "unsaved": torch.tensor(float(self._could_not_save()), device=device),
            }
        )

    def _could_not_save(self) -> bool:
        return self.checkpoints is not None and self.checkpoints.has_failed

    def _tell(self, measured: Mapping[str, float]) -> None:
        if self.report is not None and self.topology.world_rank == 0:
            self.report(self.step, measured)
