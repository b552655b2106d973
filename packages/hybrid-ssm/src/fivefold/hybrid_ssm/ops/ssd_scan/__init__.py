"""The selective state-space scan of Mamba-2."""

import math

import torch.nn.functional as F
from torch import Tensor

from fivefold.hybrid_ssm.ops.ssd_scan import op

__all__ = ["ssd_scan"]


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803 - the paper's names
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    *,
    D: Tensor | None = None,  # noqa: N803
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None,
    seq_ids: Tensor | None = None,
    chunk_size: int | None = None,
    return_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run ``h = exp(dt A) h + dt x ⊗ B; y = h C + D x`` over each sequence.

    Structured state-space duality, Dao and Gu, arXiv 2405.21060. Computes in float32 (float64 for
    float64 ``x``) and rounds the result once. With B batch, S tokens, H heads, P values in a head,
    G groups, N values of state:

    Args:
        x: (B, S, H, P).
        dt: step sizes (B, S, H), before bias, softplus and limits.
        A: (H,), usually negative.
        B: (B, S, G, N); H/G consecutive heads share a group.
        C: like B.
        D: (H,), the weight of the skip from ``x``; the default is none.
        z: like x; the result is multiplied by ``silu(z)``.
        dt_bias: (H,), added to ``dt``.
        dt_softplus: whether ``dt`` then goes through softplus.
        dt_limit: least and greatest step size, applied last.
        initial_state: (B, H, P, N) before the first token; the default is zeros.
        seq_ids: integers (B, S), the same in all tokens of a document and different in the next
            one's: the state starts from zero at each document after the first. ``initial_state``
            belongs to the first, the final state to the last.
        chunk_size: how many tokens are taken together; the default is what is fastest. It does not
            change results beyond rounding.
        return_final_state: whether to return the state after the last token too.
        backend: the default is the best there is.

    Returns:
        ``y`` like x, or ``y`` and the final state (B, H, P, N) in the dtype that is computed in.

    Raises:
        HybridInputError: the tensors do not fit together.

    >>> import torch
    >>> ones = torch.ones(1, 3, 1, 1)
    >>> ssd_scan(ones, ones[..., 0], torch.zeros(1), ones, ones).flatten()
    tensor([1., 2., 3.])
    """
    inputs = op.Inputs(
        *(x, dt, A, B, C, D, dt_bias, initial_state),
        dt_softplus=dt_softplus,
        dt_min=float(dt_limit[0]),
        dt_max=float(dt_limit[1]),
        chunk_size=op.chunk_of(chunk_size),
    )
    y, final_state = op.apply(inputs, z, seq_ids, backend)
    if z is not None:
        wide = final_state.dtype
        y = (y.to(wide) * F.silu(z.to(wide))).to(x.dtype)
    return (y, final_state) if return_final_state else y
