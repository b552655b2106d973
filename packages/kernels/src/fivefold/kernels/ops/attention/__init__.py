"""Attention with an additive bias, a mask of keys, a causal band and its log-sum-exp."""

from typing import Literal, overload

from torch import Tensor

from fivefold.kernels.ops.attention import op

__all__ = ["attention"]


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = ...,
    *,
    key_mask: Tensor | None = ...,
    is_causal: bool = ...,
    causal_offset: int = ...,
    window: int | None = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = ...,
    *,
    key_mask: Tensor | None = ...,
    is_causal: bool = ...,
    causal_offset: int = ...,
    window: int | None = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    *,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_offset: int = 0,
    window: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention: ``softmax(query @ key.mT * scale + bias) @ value``.

    Scores exist a tile at a time, and the bias is never spread over the dims it is broadcast to
    (FlashAttention-2, arXiv 2307.08691). A query that sees no key gets zeros and gives none of its
    gradient to anything. Follows autocast like torch's, except for the bias.

    Args:
        query: (..., H, Tq, D), with any leading dims.
        key: (..., G, Tk, D), where G divides H: as many consecutive query heads share one.
        value: (..., G, Tk, Dv).
        bias: added to the scores in natural units; floating-point, broadcastable to
            (..., H, Tq, Tk), with a gradient of its own shape.
        key_mask: True where a key may be attended; bool, broadcastable to (..., Tk).
            Keys and values that are masked have to be finite all the same, as for torch.
        is_causal: query i sees key j only where j <= i + causal_offset.
        causal_offset: 0 puts the first query at the first key, as torch does; Tk - Tq puts the
            last query at the last key, as a cache of keys needs it.
        window: of a causal query's keys, see only the last so many, up to its own position.
        scale: of the scores; the default is 1/sqrt(D).
        return_lse: also return the logarithm of the sum of the exponentials of the scores, by
            which parts of the keys are combined.
        backend: the default is the best there is.

    Returns:
        (..., H, Tq, Dv), whose heads of a position lie side by side in memory, so that merging
        them copies nothing. With ``return_lse`` also the natural log-sum-exp (..., H, Tq) in
        float32 (float64 for float64), minus infinity where no key is seen.

    Raises:
        KernelInputError: the shapes, dtypes or options do not fit together.

    >>> import torch
    >>> x = torch.eye(2).reshape(1, 2, 2)
    >>> attention(x, x, x, is_causal=True, scale=0.0)
    tensor([[[1.0000, 0.0000],
             [0.5000, 0.5000]]])
    """
    options = op.Options(is_causal=is_causal, causal_offset=causal_offset, window=window)
    out, lse = op.apply(query, key, value, bias, key_mask, options, scale, backend)
    return (out, lse) if return_lse else out
