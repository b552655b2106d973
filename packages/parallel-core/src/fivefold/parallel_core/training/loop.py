"""The training loop: a parallel model, a loss and batches in, finished steps out."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fivefold.parallel_core.build import ParallelModel
from fivefold.parallel_core.checkpoint import Checkpoints, TensorPart
from fivefold.parallel_core.collectives import sum_over
from fivefold.parallel_core.errors import CheckpointError, ConfigError, ParallelError
from fivefold.parallel_core.gradients import clip, global_norm, sum_partial
from fivefold.parallel_core.pipeline import Runner
from fivefold.parallel_core.rng import seed_ranks
from fivefold.parallel_core.training.config import TrainingConfig
from fivefold.parallel_core.training.ends import Batches, Outcome, Report
from fivefold.parallel_core.training.optimizer import (
    TORCH_ADAMW,
    MakeAdamW,
    ShardedAdamW,
)
from fivefold.parallel_core.training.state import Progress, load_state, save_state
from fivefold.parallel_core.training.stopping import StopRequest
from fivefold.parallel_core.training.totals import Totals

__all__ = ["Batches", "Outcome", "Report", "Trainer", "TrainingConfig"]


class Trainer:
    """Trains one model on one layout; every rank makes one and calls the same methods.

    Attributes:
        step: finished steps.
        skipped: those of them whose gradient was not finite.
        heldout_loss: of the last evaluation, in nats a token.
        report: called on rank 0 after each step and evaluation; None tells nobody.

    Args:
        config: the run.
        model: this rank's part, with values.
        runner: runs the model's microbatches.
        batches: training data of this rank.
        heldout: held-out batches of this rank, the same number on each; may be empty.
        checkpoints: where to save; None saves nothing.
        identity: plain data that a resumed run must share (the data's fingerprint, say).
        summarise: from sums of the model's side outputs and the number of sequences to figures.
        ignore_index: target that counts as no token.
        make_optimizer: torch's AdamW, or one that computes the same in another way.
    """

    def __init__(
        self,
        config: TrainingConfig,
        model: ParallelModel,
        runner: Runner,
        batches: Batches,
        heldout: Iterable[tuple[Tensor, ...]] = (),
        *,
        checkpoints: Checkpoints | None = None,
        identity: Mapping[str, Any] | None = None,
        summarise: Callable[[Mapping[str, Tensor], int], dict[str, float]] | None = None,
        ignore_index: int = -100,
        make_optimizer: MakeAdamW = TORCH_ADAMW,
    ):
        self.config, self.model, self.runner = config, model, runner
        self.batches, self.heldout, self.checkpoints = batches, heldout, checkpoints
        self.topology = model.topology
        seed_ranks(self.topology, config.seed)
        self.pieces = model.pieces()
        self.optimizer = ShardedAdamW(self.pieces, config.optimizer, make_optimizer)
        self.step = self.skipped = self._skipped_in_a_row = 0
        self.heldout_loss: float | None = None
        self._evaluated = -1
        # What decides which samples a step sees; a resumed run must agree on it.
        self.identity = {
            "global_batch_size": config.global_batch_size,
            "sequence_length": config.sequence_length,
            "seed": config.seed,
            **(identity or {}),
        }
        self.report: Report | None = None
        self._summarise = summarise
        self._ignore_index = ignore_index
        self._totals = Totals(self.topology.world)
        self._heldout_totals = Totals(self.topology.world)
        self._stop = StopRequest()

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
        if self.step > self.config.steps:
            raise ConfigError(
                f"{newest} is after step {self.step}, but training ends at steps="
                f"{self.config.steps}; ask for at least {self.step} steps, or train into another "
                "folder"
            )
        return self.step

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
        """Train until the last step, or until SIGTERM or Ctrl-C asks to stop; saves either way.

        Raises:
            CheckpointError: a checkpoint cannot be written, in the background or not.
        """
        with self._stop.heard(), self._saved_in_the_end():
            while self.step < self.config.steps:
                stop = self.train_step()
                last = self.step == self.config.steps
                if self._due(self.config.evaluate_every, last):
                    self.evaluate()
                if stop or last or self.step % self.config.checkpoint_every == 0:
                    self.save(in_background=self.config.checkpoint_in_background)
                if stop:
                    break
        if self.step == self.config.steps and self.heldout_loss is None:
            self.evaluate()
        return Outcome(self.step, self.step == self.config.steps, self.heldout_loss)

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

    def _due(self, every: int | None, last: bool) -> bool:
        return last or (every is not None and self.step % every == 0)

    def train_step(self) -> bool:
        """One optimizer step; returns whether any rank was asked to stop."""
        start = time.perf_counter()
        batch = (x.to(self.topology.device) for x in self.batches.batch(self.step))
        inputs, targets, *starts = batch
        self.model.train()
        self.model.weigh_side_losses(1 / self.config.global_batch_size)
        tokens = max(float(sum_over(self._count(targets), self.topology.axis("dp-cp"))), 1.0)
        loss = self.runner.train(inputs, targets, 1 / tokens, *starts)
        norm, learning_rate = self._update()
        sums = self._sum_totals(loss)
        stop = bool(sums.pop("stop") > 0)
        if sums.pop("unsaved") > 0:
            self._wait_for_checkpoint()  # raises, on all ranks in the same step
        if math.isfinite(norm):
            self.model.after_step(sums)
        seconds = time.perf_counter() - start
        self._tell(
            {
                "loss": float(sums.pop("loss")) / tokens,
                **(self._summarise(sums, self.config.global_batch_size) if self._summarise else {}),
                "grad_norm": norm,
                "learning_rate": learning_rate,
                **({"skipped_steps": self.skipped} if self.skipped else {}),
                "tokens_per_second": tokens / seconds,
                "seconds": seconds,
            }
        )
        return stop

    def _update(self) -> tuple[float, float]:
        """Reduce and clip the gradients and step; their norm before, and the learning rate."""
        sum_partial(self.pieces, self.topology)
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

    def _sum_totals(self, loss: Tensor) -> dict[str, Tensor]:
        """Over all ranks: the loss, the model's side outputs, and who must stop and why."""
        return self._totals.sum(
            {
                "loss": self._once_per_tp(loss),
                "stop": torch.tensor(float(self._stop.asked), device=loss.device),
                "unsaved": torch.tensor(float(self._could_not_save()), device=loss.device),
                **self.model.drain_side_outputs(),
            }
        )

    def _could_not_save(self) -> bool:
        return self.checkpoints is not None and self.checkpoints.has_failed

    def evaluate(self) -> float | None:
        """Mean loss in nats a token over the held-out batches; None where there are none."""
        self.model.train(False)
        sums = {"loss": torch.zeros((), dtype=torch.float64), "tokens": torch.zeros(())}
        last = self.topology.rank("pp") == self.topology.size("pp") - 1
        for batch in self.heldout:
            inputs, targets, *starts = (x.to(self.topology.device) for x in batch)
            loss = self.runner.evaluate(inputs, targets, *starts)
            sums["loss"] += self._once_per_tp(loss).cpu()
            sums["tokens"] += self._once_per_tp(self._count(targets)).cpu() * last
        self.model.drain_side_outputs()  # what a model counts here is none of the next step's
        totals = self._heldout_totals.sum(sums)
        if totals["tokens"] > 0:
            self.heldout_loss = float(totals["loss"] / totals["tokens"])
            self._evaluated = self.step
            self._tell({"heldout_loss": self.heldout_loss})
        return self.heldout_loss

    def _count(self, targets: Tensor) -> Tensor:
        return (targets != self._ignore_index).sum().double()

    def _once_per_tp(self, value: Tensor) -> Tensor:
        """The value on one of the ranks that compute the same one, zero on the others."""
        return value.double() if self.topology.rank("tp") == 0 else torch.zeros_like(value).double()

    def _tell(self, measured: Mapping[str, float]) -> None:
        if self.report is not None and self.topology.world_rank == 0:
            self.report(self.step, measured)
