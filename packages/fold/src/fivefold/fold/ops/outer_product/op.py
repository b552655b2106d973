"""``outer_product`` as registered ops: shapes for tracing, gradients.

Legend: B batch, S sequences, I and J residues, C and D channels, Z channels of the result.
"""

from typing import Any

from torch import Tensor

from fivefold.fold.errors import FoldInputError
from fivefold.kernels.autocast import as_autocast
from fivefold.kernels.op import define

BACKENDS = ("aten", "reference")


@define("fivefold_fold", backends=BACKENDS)
def outer_product_forward(
    a: Tensor,
    b: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    num_rows: int | None,
    backend: str | None,
) -> Tensor:
    """``a`` (B, S, I, C), ``b`` (B, S, J, D), ``weight`` (Z, C * D) to the result (B, I, J, Z)."""
    return a.new_empty(a.shape[0], a.shape[2], b.shape[2], weight.shape[0])


@define("fivefold_fold", backends=BACKENDS)
def outer_product_backward(
    dout: Tensor,
    a: Tensor,
    b: Tensor,
    weight: Tensor,
    num_rows: int | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``a``, ``b`` and ``weight``."""
    return a.new_empty(a.shape), b.new_empty(b.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, weight, _, ctx.num_rows, ctx.backend = inputs
    ctx.wants_bias = ctx.needs_input_grad[3]
    ctx.save_for_backward(a, b, weight)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    gradients = outer_product_backward(dout, *ctx.saved_tensors, ctx.num_rows, ctx.backend)
    dbias = dout.flatten(0, -2).sum(0) if ctx.wants_bias else None
    return *gradients, dbias, None, None


outer_product_forward.differentiate(_save, _backward)


def apply(
    a: Tensor,
    b: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    num_rows: int | None,
    backend: str | None,
) -> Tensor:
    """See ``outer_product``: follow autocast, check, fold the leading dims, run, unfold them."""
    a, b, weight, bias = as_autocast(a, b, weight, bias)
    check(a, b, weight, bias)
    if num_rows is not None and num_rows < 1:
        raise FoldInputError(f"outer_product makes at least 1 row at a time, found {num_rows}")
    lead = a.shape[:-3]
    folded = (x.reshape(lead.numel(), *x.shape[-3:]) for x in (a, b))
    out = outer_product_forward(*folded, weight, bias, num_rows, backend)
    return out.reshape(*lead, *out.shape[1:])


def check(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ``FoldInputError`` unless all of it fits together."""
    found = f"a {tuple(a.shape)}, b {tuple(b.shape)}, weight {tuple(weight.shape)}"
    if min(a.dim(), b.dim()) < 3 or a.shape[:-2] != b.shape[:-2]:
        raise FoldInputError(
            f"outer_product takes a (..., S, I, C) and b (..., S, J, D), found {found}"
        )
    if weight.dim() != 2 or weight.shape[1] != a.shape[-1] * b.shape[-1]:
        raise FoldInputError(f"outer_product takes a weight (Z, C * D), found {found}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise FoldInputError(
            f"outer_product takes a bias ({weight.shape[0]},), found {tuple(bias.shape)}"
        )
    dtypes = {x.dtype for x in (a, b, weight, bias) if x is not None}
    if len(dtypes) > 1 or not a.is_floating_point():
        named = ", ".join(sorted(map(str, dtypes)))
        raise FoldInputError(f"outer_product takes one floating-point dtype, found {named}")
