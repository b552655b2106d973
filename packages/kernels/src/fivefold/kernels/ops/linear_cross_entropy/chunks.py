"""``linear_cross_entropy`` with any backend's softmax: logits of one chunk of tokens at a time.

Every backend of the op is these functions around its own kernels for ``cross_entropy``.

Legend: N tokens, D features, V classes, C the tokens of a chunk.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from fivefold.kernels.operands import sum_dtype
from fivefold.kernels.ops.cross_entropy.reference import check_range
from fivefold.kernels.ops.linear import linear

# Bytes of a chunk's logits and their gradient. On a GPU the weight's gradient, which is read and
# written once for each chunk, wants thousands of tokens; on a CPU some dozens hide it.
_BUDGET = {"cpu": 32 << 20}
_BUDGET_ON_DEVICES = 1 << 30
# Bytes of a part of a large tensor that is made or rounded in another dtype on its way.
_PART = 8 << 20


class Softmax(Protocol):
    """A backend's file of ``cross_entropy``."""

    def cross_entropy_forward(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
    ) -> tuple[Tensor, Tensor]:
        """Losses and log-sum-exps."""

    def cross_entropy_backward(
        self,
        dloss: Tensor,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        lse: Tensor,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
    ) -> Tensor:
        """The gradient of the logits."""


def tokens(
    softmax: Softmax,
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor]:
    """The losses (N,) and log-sum-exps (N,)."""
    check_range(target, linear_weight.shape[0], ignore_index)
    options = weight, ignore_index, label_smoothing, z_loss

    def statistics(rows: slice) -> tuple[Tensor, Tensor]:
        logits_cv = linear(x[rows], linear_weight, linear_bias)
        return softmax.cross_entropy_forward(logits_cv, target[rows], *options)

    found = [statistics(rows) for rows in chunks(x, linear_weight.shape[0])]
    losses, lses = zip(*found, strict=True)
    return torch.cat(losses), torch.cat(lses)


def backward(
    softmax: Softmax,
    dloss: Tensor,
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``linear_weight`` and ``linear_bias``, empty where not needed."""
    options = ignore_index, label_smoothing, z_loss
    gradients = Gradients(x, linear_weight, needed)

    def dlogits(rows: slice) -> Tensor:
        logits_cv = linear(x[rows], linear_weight, linear_bias)
        return softmax.cross_entropy_backward(
            dloss[rows], logits_cv, target[rows], weight, lse[rows], *options
        )

    for rows in chunks(x, linear_weight.shape[0]):
        gradients.add(rows, dlogits(rows))
    return gradients.found


def total(
    softmax: Softmax,
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum of the losses, and its gradients as above."""
    check_range(target, linear_weight.shape[0], ignore_index)
    options = ignore_index, label_smoothing, z_loss
    gradients = Gradients(x, linear_weight, needed)

    def loss_and_dlogits(rows: slice) -> tuple[Tensor, Tensor]:
        logits_cv = linear(x[rows], linear_weight, linear_bias)
        loss_c, lse_c = softmax.cross_entropy_forward(logits_cv, target[rows], weight, *options)
        # Autograd differentiates the loss, and it alone, where this is a specification.
        with torch.no_grad():
            dlogits_cv = softmax.cross_entropy_backward(
                torch.ones_like(loss_c), logits_cv, target[rows], weight, lse_c, *options
            )
        return loss_c.sum(), dlogits_cv

    sums = []
    for rows in chunks(x, linear_weight.shape[0]):
        loss, dlogits_cv = loss_and_dlogits(rows)
        sums.append(loss)
        gradients.add(rows, dlogits_cv)
        # Before the next chunk's logits are made.
        del dlogits_cv
    return torch.stack(sums).sum(), *gradients.found


def scale(gradients: list[Tensor], factor: Tensor) -> list[Tensor]:
    """Gradients times ``factor`` (), in the dtype of the first, rounded once."""
    # With a dim, so that it is not rounded to a lower dtype before it multiplies.
    factor = factor.reshape(1)
    scaled = [torch.empty(x.shape, dtype=gradients[0].dtype, device=x.device) for x in gradients]
    for x, y in zip(gradients, scaled, strict=True):
        for part in _parts(x):
            torch.mul(x[part], factor, out=y[part])
    return scaled


class Gradients:
    """Gradients of a linear layer, a chunk of tokens after the other.

    Attributes:
        found: of input in its dtype, of weight and bias in the dtype of sums; empty (0,) where not
            needed.
    """

    def __init__(self, x: Tensor, linear_weight: Tensor, needed: list[bool]):
        self._x, self._weight, self._needed = x, linear_weight, needed
        num_classes, width = linear_weight.shape
        dtype, device = sum_dtype(x.dtype), x.device
        self.found = (
            torch.empty(x.shape if needed[0] else (0,), dtype=x.dtype, device=device),
            torch.empty((num_classes, width) if needed[1] else (0,), dtype=dtype, device=device),
            torch.zeros(num_classes if needed[2] else 0, dtype=dtype, device=device),
        )

    @torch.no_grad()
    def add(self, rows: slice, dlogits_cv: Tensor) -> None:
        """What the gradient of these rows' logits contributes."""
        dx, dweight, dbias = self.found
        if self._needed[0]:
            dx[rows] = linear(dlogits_cv, self._weight.t())
        if self._needed[1]:
            _add_product(dweight, dlogits_cv.T, self._x[rows].T, first=rows.start == 0)
        if self._needed[2]:
            dbias += dlogits_cv.sum(0, dtype=dbias.dtype)


def chunks(x: Tensor, num_classes: int) -> Iterator[slice]:
    """Rows of ``x`` (N, D) whose logits may exist at once; at least one slice."""
    num_tokens = max(x.shape[0], 1)
    size = chunk_size(num_tokens, num_classes * x.element_size(), x.device.type)
    for start in range(0, num_tokens, size):
        yield slice(start, start + size)


def chunk_size(num_tokens: int, row_bytes: int, device: str) -> int:
    """Tokens of a chunk: as many as the budget has room for, and about as many in each.

    Args:
        num_tokens: of all chunks, at least 1.
        row_bytes: of a token's logits.
        device: its type.
    """
    most = max(1, _BUDGET.get(device, _BUDGET_ON_DEVICES) // (2 * row_bytes))
    num_chunks = -(-num_tokens // most)
    size = -(-num_tokens // num_chunks)
    # Whole tiles of a product where that does not break the budget.
    whole = -(-size // 64) * 64
    return whole if whole <= most else size


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """``total += a @ b.T`` in the dtype of ``total``, which holds nothing yet the first time."""
    beta = 0 if first else 1
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b.T, beta=beta, out_dtype=total.dtype, out=total)
    elif a.is_cuda or a.dtype == torch.float64:
        total.addmm_(a, b.T, beta=beta)
    else:
        # Of bfloat16, a product in float32 takes three times as long and is only as exact as its
        # operands. Of float32, the sum passes once more over memory, but oneDNN has made it.
        for part in _parts(total):
            if first:
                total[part] = linear(a[part], b)
            else:
                total[part] += linear(a[part], b)


def _parts(x: Tensor) -> Iterator[slice]:
    """Rows of ``x`` of so many bytes; on other devices all at once, which need no copies."""
    size = max(1, x.shape[0])
    if x.device.type == "cpu":
        size = max(1, _PART // max(1, x[:1].nbytes))
    for start in range(0, x.shape[0], size):
        yield slice(start, start + size)
