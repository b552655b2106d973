"""The training loop of a language model: batches of tokens in, finished steps out."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fivefold.parallel_core.build import ParallelModel
from fivefold.parallel_core.checkpoint import Checkpoints
from fivefold.parallel_core.collectives import sum_over
from fivefold.parallel_core.pipeline import Runner
from fivefold.parallel_core.training.base_loop import Loop
from fivefold.parallel_core.training.config import TrainingConfig
from fivefold.parallel_core.training.ends import Batches, Outcome, Report
from fivefold.parallel_core.training.optimizer import TORCH_ADAMW, MakeAdamW
from fivefold.parallel_core.training.totals import Totals

__all__ = ["Batches", "Outcome", "Report", "Trainer", "TrainingConfig"]


class Trainer(Loop):
    """Trains one model on one layout; every rank makes one and calls the same methods.

    Attributes:
        heldout_loss: of the last evaluation, in nats a token.

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

    config: TrainingConfig

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
        super().__init__(
            config,
            model,
            checkpoints=checkpoints,
            identity={
                "global_batch_size": config.global_batch_size,
                "sequence_length": config.sequence_length,
                **(identity or {}),
            },
            make_optimizer=make_optimizer,
        )
        self.runner, self.batches, self.heldout = runner, batches, heldout
        self._summarise = summarise
        self._ignore_index = ignore_index
        self._tokens = 1.0
        self._heldout_totals = Totals(self.topology.world)

    def backward(self) -> dict[str, Tensor]:
        """See ``Loop.backward``: the loss, and the model's side outputs."""
        batch = (x.to(self.topology.device) for x in self.batches.batch(self.step))
        inputs, targets, *starts = batch
        self.model.weigh_side_losses(1 / self.config.global_batch_size)
        tokens = sum_over(self._count(targets), self.topology.axis("dp-cp"))
        self._tokens = max(float(tokens), 1.0)
        loss = self.runner.train(inputs, targets, 1 / self._tokens, *starts)
        return {"loss": self._once_per_tp(loss), **self.model.drain_side_outputs()}

    def describe(self, sums: Mapping[str, Tensor], seconds: float) -> dict[str, float]:
        """See ``Loop.describe``: the mean loss, figures of the side outputs, tokens a second."""
        sides = {name: value for name, value in sums.items() if name != "loss"}
        figures = self._summarise(sides, self.config.global_batch_size) if self._summarise else {}
        return {
            "loss": float(sums["loss"]) / self._tokens,
            **figures,
            "tokens_per_second": self._tokens / seconds,
        }

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
            mean = float(totals["loss"] / totals["tokens"])
            self._keep_heldout_loss(mean)
            self._tell({"heldout_loss": mean})
        return self.heldout_loss

    def _count(self, targets: Tensor) -> Tensor:
        return (targets != self._ignore_index).sum().double()

    def _once_per_tp(self, value: Tensor) -> Tensor:
        """The value on one of the ranks that compute the same one, zero on the others."""
        return value.double() if self.topology.rank("tp") == 0 else torch.zeros_like(value).double()
