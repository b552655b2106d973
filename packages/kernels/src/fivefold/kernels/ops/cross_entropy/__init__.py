"""Softmax cross entropy with class weights, label smoothing and z-loss."""

from torch import Tensor

from fivefold.kernels.ops.cross_entropy import op

__all__ = ["cross_entropy"]


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """``torch.nn.functional.cross_entropy`` of class indices, with no float32 copy of the logits.

    Keeps the logits and one log-sum-exp a token for the gradient, which it makes in the logits'
    dtype. The loss is float32 for logits of fewer bits, where torch rounds it to their dtype.

    Args:
        input: logits, (N, V) or (V,), V classes.
        target: class indices in int64 or int32, (N,) or ().
        weight: (V,), of the classes, as in torch; it gets no gradient.
        ignore_index: targets that count for nothing: no loss, no gradient, no place in the mean.
        reduction: "mean" over the weights of the targets that count, "sum", or "none".
        label_smoothing: part of the target that all classes share, 0 to 1. arXiv 1512.00567.
        z_loss: adds ``z_loss * log(sum(exp(logits)))²`` to the loss of each token that counts,
            whatever its class weighs. PaLM, arXiv 2204.02311, has 1e-4.
        backend: the default is the best there is.

    Returns:
        (), or of target's shape for "none".

    Raises:
        KernelInputError: shapes or options do not fit, or, on a CPU, a target is out of range; on
            a GPU the loss of such a target is NaN.

    >>> import torch
    >>> cross_entropy(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([1, 0]))
    tensor(0.2201)
    """
    options = op.Options(ignore_index, reduction, label_smoothing, z_loss)
    return op.apply(input, target, weight, options, backend)
