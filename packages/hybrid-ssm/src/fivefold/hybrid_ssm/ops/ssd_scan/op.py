"""``ssd_scan`` as registered ops: shapes for tracing, gradients, checks.

Legend: B batch, S tokens, H heads, P values in a head, G groups, N values of state.
"""

# ruff: noqa: N803, N806 - the paper's names A, B, C and D

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fivefold.hybrid_ssm.errors import HybridInputError
from fivefold.hybrid_ssm.ops.checks import check_ids, check_limits, check_shapes
from fivefold.hybrid_ssm.ops.documents import count_documents
from fivefold.kernels.op import define

BACKENDS = ("triton", "cpu", "mamba", "reference")

# The inputs of the forward pass, which are the last of the backward pass, as backends take them.
Arguments = tuple[
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    bool,
    float,
    float,
    int,
]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Inputs(NamedTuple):
    """``Arguments`` by name.

    Attributes:
        x: (B, S, H, P).
        dt: (B, S, H).
        A: (H,).
        B: (B, S, G, N).
        C: like B.
        D: (H,) or None.
        dt_bias: (H,) or None.
        initial_state: (B, H, P, N) or None.
        documents: (B, S) int32, counts the documents of each sequence from 0; None for one.
        dt_softplus: whether step sizes go through softplus.
        dt_min: least step size.
        dt_max: greatest.
        chunk_size: tokens to take together; 0 leaves the choice to the backend.
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    dt_bias: Tensor | None = None
    initial_state: Tensor | None = None
    documents: Tensor | None = None
    dt_softplus: bool = False
    dt_min: float = 0.0
    dt_max: float = math.inf
    chunk_size: int = 0

    @property
    def limits(self) -> tuple[bool, float, float]:
        """Softplus or not, least and greatest step size."""
        return self.dt_softplus, self.dt_min, self.dt_max


@define("fivefold_hybrid_ssm", backends=BACKENDS)
def ssd_scan_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    documents: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    chunk_size: int,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """See ``Inputs``: the result (B, S, H, P) and the final state (B, H, P, N)."""
    batch, _, num_heads, head_dim = x.shape
    return (
        x.new_empty(x.shape),
        x.new_empty((batch, num_heads, head_dim, B.shape[3]), dtype=wide(x.dtype)),
    )


@define("fivefold_hybrid_ssm", backends=BACKENDS)
def ssd_scan_backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    documents: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    chunk_size: int,
    backend: str | None,
) -> Gradients:
    """Gradients of ``x`` to ``initial_state``, empty (0,) where absent."""
    return (
        x.new_empty(x.shape),
        dt.new_empty(dt.shape),
        A.new_empty(A.shape),
        B.new_empty(B.shape),
        C.new_empty(C.shape),
        _like(D, x),
        _like(dt_bias, x),
        _like(initial_state, x),
    )


def _like(option: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0) if option is None else option.new_empty(option.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:9])
    ctx.options = inputs[9:]
    ctx.num_inputs = len(inputs)


def _backward(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None) -> Any:
    tensors = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(tensors[0])
    gradients = ssd_scan_backward(dy, dfinal_state, *tensors, *ctx.options)
    optional = zip(gradients[5:], tensors[5:8], strict=True)
    found = (*gradients[:5], *(g if x is not None else None for g, x in optional))
    return found + (None,) * (ctx.num_inputs - len(found))


ssd_scan_forward.differentiate(_save, _backward)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is computed in."""
    return torch.promote_types(dtype, torch.float32)


def chunk_of(chunk_size: int | None) -> int:
    """What backends are asked for: 0 for what is fastest.

    Raises:
        HybridInputError: it is less than 1.
    """
    if chunk_size is not None and chunk_size < 1:
        raise HybridInputError(f"ssd_scan takes a chunk_size of at least 1, found {chunk_size}")
    return chunk_size or 0


def apply(
    inputs: Inputs, z: Tensor | None, seq_ids: Tensor | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    """See ``ssd_scan``: check and run inputs without documents; ``z`` is only looked at."""
    check(inputs, z, seq_ids)
    documents = None if seq_ids is None else count_documents(seq_ids)
    return ssd_scan_forward(*inputs._replace(documents=documents), backend)


def check(inputs: Inputs, z: Tensor | None, seq_ids: Tensor | None) -> None:
    """Raise ``HybridInputError`` unless the inputs fit together."""
    x, B = inputs.x, inputs.B
    if x.dim() != 4 or not x.is_floating_point():
        raise HybridInputError(
            f"ssd_scan takes floating-point x (batch, tokens, heads, head_dim), found {x.dtype} "
            f"of shape {tuple(x.shape)}"
        )
    batch, num_tokens, num_heads, head_dim = x.shape
    if B.dim() != 4 or B.shape[:2] != x.shape[:2] or B.shape[2] < 1 or num_heads % B.shape[2]:
        raise HybridInputError(
            f"ssd_scan of x {tuple(x.shape)} takes B of shape ({batch}, {num_tokens}, groups, "
            f"state) whose groups divide the {num_heads} heads, found {tuple(B.shape)}"
        )
    tokens, heads = (batch, num_tokens), (num_heads,)
    wanted = (
        ("dt", inputs.dt, (*tokens, num_heads)),
        ("A", inputs.A, heads),
        ("C", inputs.C, tuple(B.shape)),
        ("D", inputs.D, heads),
        ("z", z, tuple(x.shape)),
        ("dt_bias", inputs.dt_bias, heads),
        ("initial_state", inputs.initial_state, (batch, num_heads, head_dim, B.shape[3])),
        ("seq_ids", seq_ids, tokens),
    )
    check_shapes("ssd_scan", x, wanted)
    check_limits("ssd_scan", (inputs.dt_min, inputs.dt_max))
    check_ids("ssd_scan", seq_ids)
