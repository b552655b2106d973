"""The token loss on the fused op."""

from torch import Tensor

from fivefold.kernels import cross_entropy
from fivefold.parallel_core.losses import CrossEntropy


class TokenLoss(CrossEntropy):
    """``CrossEntropy`` without a float32 copy of the logits."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """``logits`` (..., V) and integer ``targets`` (...) to a scalar, in float32 or wider."""
        return cross_entropy(
            logits.flatten(0, -2),
            targets.flatten(),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction="sum",
        )
