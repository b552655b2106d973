"""Linear layers in FP8, on one rank and split over the tensor axis.

A module becomes one of these in place, by its class, and keeps its parameters: what sharding over
data ranks, recomputation and checkpoints know of it stays true.

Legend: B sequences, S tokens, M = B * S rows, K features of the input, N of the result.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fivefold.parallel_core.collectives import all_reduce, copy, reduce_scatter, scatter_sum_along
from fivefold.parallel_core.fp8.products import Products
from fivefold.parallel_core.fp8.scaling import E4M3, Format, gathered, largest, rounded, scale_of
from fivefold.parallel_core.tensor_parallel import ColumnParallelLinears, RowParallelLinear
from fivefold.parallel_core.topology import Axis


@dataclass(frozen=True, slots=True)
class How:
    """What computes a product, and which of its tensors are spread over ranks.

    Attributes:
        axis: the ranks; None or of one rank where nothing is spread.
        format: how tensors are rounded.
        products: what computes.
        gather: whether the input is gathered along the sequence for the product.
        x: whether ranks hold parts of the input.
        weight: whether they hold parts of the weights.
        y: whether they hold parts of the result.
    """

    axis: Axis | None
    format: Format
    products: Products
    gather: bool = False
    x: bool = False
    weight: bool = False
    y: bool = False

    @property
    def alone(self) -> bool:
        """Whether this rank holds everything."""
        return self.axis is None or self.axis.size == 1

    def over(self, spread: bool) -> Axis | None:
        """The ranks of a tensor that is spread or not."""
        return self.axis if spread else None


class _SplitLinears(torch.autograd.Function):
    """Several linears of one input, all of it or a part on this rank; results without bias.

    What is kept is one byte for each value of this rank's part of the input, and of the weights.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, how: How, *weights: Tensor) -> tuple[Tensor, ...]:
        power_of_2 = how.format.power_of_2
        (amax_x,) = largest([x], how.over(how.x))
        amaxes = largest(weights, how.over(how.weight))
        scale_x, *scales = (scale_of(each, E4M3, power_of_2) for each in (amax_x, *amaxes))
        x_fp8 = rounded(x, scale_x, E4M3)
        rounds = [rounded(w, scale, E4M3) for w, scale in zip(weights, scales, strict=True)]
        ctx.save_for_backward(x_fp8, scale_x, *rounds, *scales)
        ctx.how, ctx.count, ctx.dtype = how, len(weights), x.dtype
        whole = _whole(x_fp8, how)
        rows = whole.flatten(0, -2)
        return tuple(
            how.products.matrix(rows, scale_x, w, scale, x.dtype).view(*whole.shape[:-1], -1)
            for w, scale in zip(rounds, scales, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_fp8, scale_x, *rest = ctx.saved_tensors
        how, weights, scales = ctx.how, rest[: ctx.count], rest[ctx.count :]
        dtype = how.format.grad_dtype
        dscales = [
            scale_of(amax, dtype, how.format.power_of_2) for amax in largest(grads, how.over(how.y))
        ]
        rows = [rounded(g.flatten(0, -2), s, dtype) for g, s in zip(grads, dscales, strict=True)]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _sum_products(how.products, rows, dscales, weights, scales, ctx.dtype)
            dx = dx.view(*grads[0].shape[:-1], -1)
            dx = scatter_sum_along(dx, how.axis, 1) if how.gather else dx
        x_mk = _whole(x_fp8, how).flatten(0, -2)
        x_km = x_mk.t().contiguous()
        dweights = [
            how.products.matrix(dy.t().contiguous(), s, x_km, scale_x, ctx.dtype)
            if needed
            else None
            for dy, s, needed in zip(rows, dscales, ctx.needs_input_grad[2:], strict=True)
        ]
        return dx, None, *dweights


def _whole(x_fp8: Tensor, how: How) -> Tensor:
    if not how.gather or how.axis is None:
        return x_fp8
    return gathered(x_fp8, how.axis, 1)


def _sum_products(
    products: Products,
    rows: list[Tensor],
    dscales: list[Tensor],
    weights: list[Tensor],
    scales: list[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of the input of several linears (M, K)."""
    parts = [
        products.matrix(dy, dscale, w.t().contiguous(), scale, dtype)
        for dy, dscale, w, scale in zip(rows, dscales, weights, scales, strict=True)
    ]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def linears(x: Tensor, modules: list[Any], how: How) -> tuple[Tensor, ...]:
    """Several linears of one input, with their biases; one rounding of the input for all."""
    # As autocast has it: weights in the dtype of the input.
    weights = [each.weight.to(x.dtype) for each in modules]
    biases = [None if each.bias is None else each.bias.to(x.dtype) for each in modules]
    if how.alone:
        form = how.format
        kind, power = form.grad_dtype, form.power_of_2
        return tuple(
            how.products.linear(x, weight, bias, grad_dtype=kind, power_of_2_scale=power)
            for weight, bias in zip(weights, biases, strict=True)
        )
    out: tuple[Tensor, ...] = _SplitLinears.apply(x, how, *weights)
    return tuple(y if bias is None else y + bias for y, bias in zip(out, biases, strict=True))


class FP8Linear(nn.Linear):
    """``nn.Linear`` in FP8; where ranks hold parts of the sequence, with scales of all of it."""

    how: How

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) to (..., N)."""
        return linears(input, [self], self.how)[0]


class FP8ColumnParallel(ColumnParallelLinears):
    """``ColumnParallelLinears`` in FP8; sends one byte for a value where the sequence is split."""

    how: How

    def forward(self, x_bsh: Tensor) -> Tensor | tuple[Tensor, ...]:
        """As in the base."""
        modules: list[Any] = [self] if self.single else list(self.children())
        if not self.sequence:
            x_bsh = copy(x_bsh, self.axis)
        out = linears(x_bsh, modules, self.how)
        return out[0] if self.single else out


class FP8RowParallel(RowParallelLinear):
    """``RowParallelLinear`` in FP8; the ranks' parts are summed in the input's dtype."""

    how: How

    def forward(self, x_bsi: Tensor) -> Tensor:
        """As in the base."""
        if self.how.alone:
            return linears(x_bsi, [self], self.how)[0]
        y: Tensor = _SplitLinears.apply(x_bsi, self.how, self.weight.to(x_bsi.dtype))[0]
        y = reduce_scatter(y, self.axis, 1) if self.sequence else all_reduce(y, self.axis)
        return y if self.bias is None else y + self.bias.to(y.dtype)
