"""The specification of ``cross_entropy`` in plain PyTorch, and its gradient written out.

Both take some rows at a time, so that what they make in float32 stays in a core's cache.

For a token with target y, class weights w (1 by default), smoothing e and z-loss z::

    loss = (1 - e) w[y] (lse - x[y]) + e / V sum_c w[c] (lse - x[c]) + z lse²
    dx[c] = exp(x[c] - lse) ((1 - e) w[y] + e / V sum(w) + 2 z lse) - e / V w[c]
            - [c = y] (1 - e) w[y]

Legend: N tokens, V classes, R the tokens that are taken at a time.
"""

import torch
from torch import Tensor

from fivefold.kernels.errors import KernelInputError
from fivefold.kernels.operands import sum_dtype, widened

# A MiB in float32: more leaves the cache, less spends its time on starting ops.
_VALUES_AT_A_TIME = 1 << 18


def cross_entropy_forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor]:
    """The losses (N,) and log-sum-exps (N,)."""
    check_range(target, logits.shape[1], ignore_index)
    counts_n, index_n = _indices(target, ignore_index)
    weight_v = _class_weights(weight, logits)
    lse_n = torch.cat([torch.logsumexp(widened(x), 1) for x in _some_rows(logits)])
    picked_n = widened(logits.gather(1, index_n.unsqueeze(1)).squeeze(1))
    loss_n = (lse_n - picked_n) * weight_v[index_n]
    if label_smoothing:
        spread_n = _mean_over_classes(logits, lse_n, weight_v)
        loss_n = (1 - label_smoothing) * loss_n + label_smoothing * spread_n
    if z_loss:
        loss_n = loss_n + z_loss * lse_n.square()
    return torch.where(counts_n, loss_n, 0), lse_n


def cross_entropy_backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """The gradient of ``logits`` (N, V)."""
    counts_n, index_n = _indices(target, ignore_index)
    weight_v = _class_weights(weight, logits)
    shared_v = weight_v * (label_smoothing / logits.shape[1])
    dloss_n = torch.where(counts_n, widened(dloss), 0)
    hit_n = (1 - label_smoothing) * weight_v[index_n]
    slope_n = (hit_n + shared_v.sum() + 2 * z_loss * lse) * dloss_n
    hit_n = hit_n * dloss_n

    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    per_token = (index_n, lse, counts_n, slope_n, hit_n, dloss_n)
    for x, dx, *columns in zip(
        *map(_some_rows, (logits, dlogits)),
        *(column.split(_rows(logits)) for column in per_token),
        strict=True,
    ):
        index_r1, lse_r1, counts_r1, slope_r1, hit_r1, dloss_r1 = (c.unsqueeze(1) for c in columns)
        gradient_rv = torch.sub(widened(x), lse_r1).exp_().mul_(slope_r1)
        if label_smoothing:
            gradient_rv.addcmul_(dloss_r1, shared_v, value=-1)
        gradient_rv.scatter_add_(1, index_r1, -hit_r1)
        # Rows that are ignored may hold anything, NaN included.
        dx.copy_(gradient_rv.masked_fill_(~counts_r1, 0))
    return dlogits


def check_range(target: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raise ``KernelInputError`` for a class index (N,) that there is no class for.

    Only on a CPU: elsewhere the host would have to wait for the device.
    """
    if target.device.type != "cpu":
        return
    wrong = (target != ignore_index) & ((target < 0) | (target >= num_classes))
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise KernelInputError(
            f"target {first} is {int(target[first])}; legal are 0 to {num_classes - 1}, for "
            f"{num_classes} classes, and the ignore_index {ignore_index}"
        )


def _mean_over_classes(logits: Tensor, lse_n: Tensor, weight_v: Tensor) -> Tensor:
    """What the losses (N,) would be with every class as the target, on average."""
    rows = zip(_some_rows(logits), lse_n.split(_rows(logits)), strict=True)
    sums = [(lse.unsqueeze(1) - widened(x)) @ weight_v for x, lse in rows]
    return torch.cat(sums) / logits.shape[1]


def _indices(target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Which targets count (N,), and classes to look up for all of them (N,)."""
    counts_n = target != ignore_index
    return counts_n, torch.where(counts_n, target, 0).long()


def _class_weights(weight: Tensor | None, logits: Tensor) -> Tensor:
    dtype = sum_dtype(logits.dtype)
    return logits.new_ones(logits.shape[1], dtype=dtype) if weight is None else weight.to(dtype)


def _some_rows(x: Tensor) -> tuple[Tensor, ...]:
    return x.split(_rows(x))


def _rows(x: Tensor) -> int:
    return max(1, _VALUES_AT_A_TIME // x.shape[1])
