"""Softmax cross entropy of a linear layer's output, which never exists as a whole."""

from torch import Tensor

from fivefold.kernels.ops.cross_entropy.op import Options
from fivefold.kernels.ops.linear_cross_entropy import op

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """``cross_entropy(input @ linear_weight.T + linear_bias, target)``, some tokens at a time.

    Takes what ``torch.nn.functional.linear_cross_entropy`` takes (torch 2.13 and later) and any
    leading dims. For "mean" and "sum" the gradients are made along with the loss, in 3 products
    instead of the 4 that "none" needs to make the logits again; the weight's gradient is summed in
    float32. Follows autocast like ``torch.nn.functional.linear``.

    Args:
        input: (..., D).
        linear_weight: (V, D), V classes.
        target: class indices in int64 or int32, (...).
        linear_bias: (V,).
        weight: (V,), of the classes; it gets no gradient.
        reduction: as ``ignore_index``, ``label_smoothing`` and ``z_loss`` see ``cross_entropy``.
        ignore_index: see reduction.
        label_smoothing: see reduction.
        z_loss: see reduction.
        backend: of the softmax; the products are torch's. The default is the best there is.

    Returns:
        (), or of target's shape for "none"; at least float32.

    Raises:
        KernelInputError: as for ``cross_entropy``.

    >>> import torch
    >>> linear_cross_entropy(torch.ones(2, 3), torch.zeros(4, 3), torch.tensor([0, 3]))
    tensor(1.3863)
    """
    options = Options(ignore_index, reduction, label_smoothing, z_loss)
    return op.apply(input, linear_weight, linear_bias, target, weight, options, backend)
