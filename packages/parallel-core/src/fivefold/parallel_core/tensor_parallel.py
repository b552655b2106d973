"""Linear layers, embedding and cross entropy whose weights are split over the tensor axis.

Shapes: b batch, s sequence (whole or this rank's part, as said), h input features, o output
features of this rank, v vocabulary of this rank.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fivefold.parallel_core.collectives import (
    all_reduce,
    copy,
    gather_along,
    reduce_scatter,
    scatter_sum_along,
    sum_over,
)
from fivefold.parallel_core.ledger import labelled
from fivefold.parallel_core.linear_group import LinearGroup
from fivefold.parallel_core.losses import CrossEntropy
from fivefold.parallel_core.topology import Axis

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``torch.nn.functional.linear`` or what takes its place."""


def product_of(module: nn.Module) -> Product:
    """How a linear, or the first of a group, multiplies: by its ``product``, else as torch does."""
    first = next(iter(module.children())) if isinstance(module, LinearGroup) else module
    product: Product = getattr(first, "product", F.linear)
    return product


class _GatheredLinears(torch.autograd.Function):
    """Several linears of one sequence-sharded input, gathered for the time of the product only.

    What is kept for backward is the rank's own part of the input; backward gathers it again. This
    is what makes the activation memory divide by the tensor size as a whole (arXiv 2205.05198,
    equation 4).
    """

    @staticmethod
    def forward(
        ctx: Any, x_bsh: Tensor, axis: Axis, count: int, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        weights, biases = parameters[:count], parameters[count:]
        ctx.save_for_backward(x_bsh, *weights)
        ctx.axis, ctx.with_bias = axis, bool(biases)
        whole = gather_along(x_bsh, axis, 1)
        return tuple(
            F.linear(whole, weight, biases[i] if biases else None)
            for i, weight in enumerate(weights)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_bsh, *weights = ctx.saved_tensors
        flat = [grad.flatten(0, 1) for grad in grads]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_whole = torch.mm(flat[0], weights[0])
            for grad, weight in zip(flat[1:], weights[1:], strict=True):
                grad_whole.addmm_(grad, weight)
            grad_x = scatter_sum_along(grad_whole.view(*grads[0].shape[:2], -1), ctx.axis, 1)
        whole = gather_along(x_bsh, ctx.axis, 1).flatten(0, 1)
        grad_weights = [grad.t().mm(whole) for grad in flat]
        grad_biases = [grad.sum(0) for grad in flat] if ctx.with_bias else []
        return grad_x, None, None, *grad_weights, *grad_biases


class ColumnParallelLinears(nn.Module):
    """Linears of one input with their output features split; made by ``of``.

    A single linear keeps its parameters under its own name and returns a tensor; a group keeps
    its linears as submodules and returns a tuple.
    """

    def __init__(self, axis: Axis, sequence: bool, single: bool):
        super().__init__()
        self.axis, self.sequence, self.single = axis, sequence, single
        self.product: Product = F.linear

    @classmethod
    def of(cls, module: nn.Module, axis: Axis, sequence: bool) -> "ColumnParallelLinears":
        """From an ``nn.Linear`` or a ``LinearGroup`` whose parameters are already local."""
        single = not isinstance(module, LinearGroup)
        parallel = cls(axis, sequence, single)
        parallel.product = product_of(module)
        if single:
            parallel.weight, parallel.bias = module.weight, module.bias
        else:
            for name, linear in module.named_children():
                parallel.add_module(name, linear)
        return parallel

    def forward(self, x_bsh: Tensor) -> Tensor | tuple[Tensor, ...]:
        """(B, S/tp, h) under sequence parallelism, else (B, S, h), to (B, S, o) each."""
        linears: list[Any] = [self] if self.single else list(self.children())
        if self.sequence and self.axis.size > 1:
            weights = [linear.weight for linear in linears]
            biases = [linear.bias for linear in linears if linear.bias is not None]
            if biases and len(biases) != len(weights):
                raise ValueError("the linears of one group must all have a bias, or none")
            out = _GatheredLinears.apply(x_bsh, self.axis, len(weights), *weights, *biases)
        else:
            x_bsh = copy(x_bsh, self.axis)
            out = tuple(self.product(x_bsh, linear.weight, linear.bias) for linear in linears)
        return out[0] if self.single else out


class RowParallelLinear(nn.Module):
    """A linear with its input features split; the ranks' parts are summed."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, axis: Axis, sequence: bool):
        super().__init__()
        self.weight, self.bias = weight, bias
        self.axis, self.sequence = axis, sequence
        self.product: Product = F.linear

    @classmethod
    def of(cls, module: nn.Module, axis: Axis, sequence: bool) -> "RowParallelLinear":
        """From an ``nn.Linear`` whose weight is already local."""
        parallel = cls(module.get_parameter("weight"), module.bias, axis, sequence)  # type: ignore[arg-type]
        parallel.product = product_of(module)
        return parallel

    def forward(self, x_bsi: Tensor) -> Tensor:
        """(B, S, i) of this rank's features to (B, S/tp, o) under sequence parallelism.

        Without it, to (B, S, o), the same on every rank.
        """
        y = self.product(x_bsi, self.weight, None)
        y = reduce_scatter(y, self.axis, 1) if self.sequence else all_reduce(y, self.axis)
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(nn.Module):
    """An embedding whose rows are split: each rank looks up its own ids, the parts are summed."""

    def __init__(self, weight: nn.Parameter, axis: Axis, sequence: bool):
        super().__init__()
        self.weight, self.axis, self.sequence = weight, axis, sequence

    def forward(self, ids_bs: Tensor) -> Tensor:
        """(B, S) ids to (B, S/tp, H) under sequence parallelism, else (B, S, H)."""
        rows = self.weight.shape[0]
        local = ids_bs - self.axis.rank * rows
        mine = (local >= 0) & (local < rows)
        x_bsh = F.embedding(local.clamp(0, rows - 1), self.weight) * mine.unsqueeze(-1)
        if self.sequence:
            return reduce_scatter(x_bsh, self.axis, 1)
        return all_reduce(x_bsh, self.axis)


class _VocabCrossEntropy(torch.autograd.Function):
    """Cross entropy of each token from logits whose vocabulary is split.

    loss = logsumexp(z) - (1-ε)·z_target - ε/V·Σz over the true vocabulary; the gradient is
    softmax(z) - (1-ε)·onehot - ε/V, of which each rank needs only its own columns.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_nv: Tensor,
        targets_n: Tensor,
        axis: Axis,
        vocab_size: int,
        ignore_index: int,
        smoothing: float,
    ) -> Tensor:
        width = logits_nv.shape[1]
        first = axis.rank * width
        true = min(max(vocab_size - first, 0), width)
        z = logits_nv.to(torch.promote_types(logits_nv.dtype, torch.float32))
        top = z[:, :true].amax(1) if true else z.new_full((z.shape[0],), -torch.inf)
        with labelled(axis.name):
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=axis.group)
        z = z - top.unsqueeze(1)
        local = targets_n - first
        mine = (local >= 0) & (local < true)
        local = local.clamp(0, max(true - 1, 0))
        # Not a product with `mine`: what is not ours may be infinite, or NaN in the padding.
        picked = torch.where(mine, z.gather(1, local.unsqueeze(1)).squeeze(1), 0.0)
        exp = z.exp()
        exp[:, true:] = 0
        sums = sum_over(torch.stack((exp.sum(1), picked, z[:, :true].sum(1))), axis)
        valid = targets_n != ignore_index
        loss = sums[0].log() - (1 - smoothing) * sums[1]
        if smoothing:
            loss = loss - smoothing / vocab_size * sums[2]
        exp.div_(sums[0].unsqueeze(1))
        ctx.save_for_backward(exp, local, mine, valid)
        ctx.constants = (smoothing, vocab_size, true, logits_nv.dtype)
        return torch.where(valid, loss, loss.new_zeros(()))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        softmax, local, mine, valid = ctx.saved_tensors
        smoothing, vocab_size, true, dtype = ctx.constants
        grad = softmax.clone()
        if smoothing:
            grad[:, :true] -= smoothing / vocab_size
        target = mine.to(grad.dtype) * (smoothing - 1)
        grad.scatter_add_(1, local.unsqueeze(1), target.unsqueeze(1))
        grad *= (grads[0] * valid).unsqueeze(1)
        return grad.to(dtype), None, None, None, None, None


class VocabParallelCrossEntropy(CrossEntropy):
    """``CrossEntropy`` of logits whose vocabulary is split over an axis; made by ``of``."""

    def __init__(self, loss: CrossEntropy, axis: Axis, vocab_size: int):
        super().__init__(loss.ignore_index, loss.label_smoothing)
        self.whole, self.axis, self.vocab_size = loss, axis, vocab_size

    @classmethod
    def of(cls, loss: CrossEntropy, axis: Axis, vocab_size: int) -> "VocabParallelCrossEntropy":
        """The parallel form of ``loss``."""
        return cls(loss, axis, vocab_size)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """``logits`` (..., V/tp) and ``targets`` (...) to the sum, the same on every rank."""
        if self.axis.size == 1:
            return self.whole(logits[..., : self.vocab_size], targets)
        return _VocabCrossEntropy.apply(
            logits.flatten(0, -2),
            targets.flatten(),
            self.axis,
            self.vocab_size,
            self.ignore_index,
            self.label_smoothing,
        ).sum()
