"""Layers of torch.nn that run the package's ops."""

from torch import Tensor, nn

from fivefold.kernels.ops.linear import linear


class Linear(nn.Linear):
    """``torch.nn.Linear`` by ``fivefold.kernels.linear``, the fastest product at hand.

    Attributes:
        product: input, weight and bias to the result; what makes another layer of this one, such
            as a plan for many ranks, multiplies by it too.
    """

    product = staticmethod(linear)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return self.product(input, self.weight, self.bias)
