"""The token loss, and the losses and counts that layers produce beside their output."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fivefold.parallel_core.recomputing import is_recomputing


class CrossEntropy(nn.Module):
    """Sum of the tokens' softmax cross entropies; the seam that vocabulary parallelism swaps.

    The sum, not the mean: the trainer divides by the number of valid tokens of the whole global
    batch, which no single rank knows, so that the loss does not depend on the layout.

    Args:
        ignore_index: targets with this value add nothing.
        label_smoothing: weight of the uniform distribution over the vocabulary, in [0, 1).
    """

    def __init__(self, ignore_index: int = -100, label_smoothing: float = 0.0):
        super().__init__()
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """``logits`` (..., V) and integer ``targets`` (...) to a scalar, in float32 or wider."""
        logits = logits.flatten(0, -2)
        return F.cross_entropy(
            logits.to(torch.promote_types(logits.dtype, torch.float32)),
            targets.flatten(),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction="sum",
        )


class _AddLoss(torch.autograd.Function):
    """Identity on ``onto`` whose backward also sends ``weight`` into ``value``."""

    @staticmethod
    def forward(ctx: Any, onto: Tensor, value: Tensor, side: "SideOutputs") -> Tensor:
        ctx.side, ctx.like = side, value.new_ones(())
        return onto.view_as(onto)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], ctx.like * ctx.side.weight, None


class SideOutputs:
    """What layers produce beside their output: extra losses and counters.

    A pipeline stage hands only its activations to the next stage, so a layer's own loss (load
    balance, z-loss) cannot travel to the end of the model. It is tied to an activation here and
    receives its gradient when that activation does.

    All values are sums over what this rank holds, so totals over ranks, microbatches and stages
    are plain sums and do not depend on the layout.

    Attributes:
        weight: gradient of the total loss with respect to each added value; the trainer sets
            1 / (sequences in the global batch).
        totals: sums since the last ``drain``, detached.
    """

    def __init__(self) -> None:
        self.weight = 1.0
        self.totals: dict[str, Tensor] = {}

    def loss(self, name: str, value: Tensor, onto: Tensor) -> Tensor:
        """Add the scalar ``value`` to the training loss; returns ``onto``, to be used instead."""
        self.count(name, value)
        return _AddLoss.apply(onto, value, self) if torch.is_grad_enabled() else onto

    def count(self, name: str, value: Tensor) -> None:
        """Add ``value`` to the total called ``name``; a recomputation adds nothing."""
        if is_recomputing():
            return
        value = value.detach()
        self.totals[name] = self.totals[name] + value if name in self.totals else value.clone()

    def drain(self) -> dict[str, Tensor]:
        """The totals so far; they start again from zero."""
        totals, self.totals = self.totals, {}
        return totals
