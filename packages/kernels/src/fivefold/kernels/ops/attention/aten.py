"""``attention`` by torch's own fused kernels, where they compute the same.

On the CPU torch has a FlashAttention that takes an additive mask, into which bias, mask of keys
and band go. On CUDA it has cuDNN's and FlashAttention-2, for what needs no mask; of those this
takes what torch itself would take on the device at hand, but not FlashAttention-2 on Hopper and
later, whose tensor cores it was not written for.

Neither gives a gradient of the bias, or takes one of the log-sum-exp.
"""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from fivefold.kernels.operands import sum_dtype
from fivefold.kernels.ops.attention.reference import by_position, visible
from fivefold.kernels.ops.attention.shapes import rows_of

_aten = torch.ops.aten
_HOPPER = 9


def refuses(name: str, *inputs: object) -> str | None:
    """Why torch's kernels do not fit a call."""
    if name == "attention_forward":
        return _refuses(*inputs)  # type: ignore[arg-type]
    _, dlse, query, key, value, bias, key_mask, _, _, *numbers, wants_dbias = inputs
    if wants_dbias:
        return "torch's fused kernels give no gradient of a bias"
    if dlse is not None:
        return "torch's fused kernels take no gradient of the log-sum-exp"
    return _refuses(query, key, value, bias, key_mask, *numbers)  # type: ignore[arg-type]


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    band_start: int | None,
    band_end: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The result (B, R, H, Tq, Dv) and the log-sum-exp of the scores (B, R, H, Tq)."""
    q, k, v = (rows_of(x) for x in (query, key, value))
    is_causal = band_end is not None
    if query.is_cuda:
        run = _cudnn_forward if _fused(query, key, value, is_causal) == "cudnn" else _flash_forward
        out, lse = run(q, k, v, is_causal, scale)
    else:
        mask, is_causal = _mask(query, key, bias, key_mask, band_start, band_end)
        k, v = _for_every_head(k, q), _for_every_head(v, q)
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale
        )
        if mask is not None:
            # Torch says 0 where a query sees no key.
            lse = lse.masked_fill((mask == -torch.inf).all(-1), -torch.inf)
    out, lse = out.unflatten(0, query.shape[:2]), lse.unflatten(0, query.shape[:2])
    return by_position(out), lse.contiguous()


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    band_start: int | None,
    band_end: int | None,
    scale: float,
    wants_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, and an empty (0,) for that of bias."""
    do, q, k, v, o = (rows_of(x) for x in (dout, query, key, value, out))
    lse = lse.flatten(0, 1)
    is_causal = band_end is not None
    if query.is_cuda:
        cudnn = _fused(query, key, value, is_causal) == "cudnn"
        run = _cudnn_backward if cudnn else _flash_backward
        gradients = run(do, q, k, v, o, lse, is_causal, scale)
    else:
        mask, is_causal = _mask(query, key, bias, key_mask, band_start, band_end)
        k, v = _for_every_head(k, q), _for_every_head(v, q)
        # A probability of exp(-inf - inf) is 0; that of exp(-inf - -inf) would be NaN.
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, o, lse, 0.0, is_causal, attn_mask=mask, scale=scale
        )
        gradients = dq, _over_shared_heads(dk, key), _over_shared_heads(dv, key)
    dquery, dkey, dvalue = (by_position(x.unflatten(0, query.shape[:2])) for x in gradients)
    return dquery, dkey, dvalue, query.new_empty(0)


def _refuses(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    band_start: int | None,
    band_end: int | None,
    scale: float,
) -> str | None:
    if 0 in query.shape or 0 in key.shape:
        return "torch's fused kernels take no empty tensors"
    if scale <= 0:
        return f"torch's fused kernels take a positive scale, found {scale}"
    if value.shape[-1] != query.shape[-1]:
        return (
            "torch's fused kernels take a value as wide as its key, found "
            f"{query.shape[-1]} and {value.shape[-1]}"
        )
    if query.device.type == "cpu":
        return _refuses_on_cpu(query, bias, key_mask)
    if query.device.type != "cuda":
        return f"torch's fused kernels run on cpu and cuda, these tensors are on {query.device}"
    plain = bias is None and key_mask is None and band_start is None
    square = band_end is None or (band_end == 0 and query.shape[-2] == key.shape[-2])
    if not plain or not square:
        return "torch's fused kernels on CUDA take no bias, mask or window, and no causal offset"
    if _fused(query, key, value, band_end is not None) is None:
        return "torch has no fused kernel for these on this device that was written for it"
    return None


def _refuses_on_cpu(query: Tensor, bias: Tensor | None, key_mask: Tensor | None) -> str | None:
    if bias is None:
        return None
    if bias.dtype not in (query.dtype, torch.float32):
        return f"torch's kernel takes a bias of {query.dtype} or torch.float32, found {bias.dtype}"
    rows = query.shape[1]
    if rows > 1 and (bias.shape[0] > 1 or key_mask is not None):
        return (
            f"torch's kernel would spread the bias over the {rows} rows that share it where there "
            f"is a mask of keys too, or more than one bias; there are {bias.shape[0]}"
        )
    return None


def _for_every_head(x: Tensor, query: Tensor) -> Tensor:
    """(N, G, Tk, D) to (N, H, Tk, D): not every torch's kernel on the CPU knows shared heads."""
    times = query.shape[1] // x.shape[1]
    return x if times == 1 else x.repeat_interleave(times, 1)


def _over_shared_heads(gradient: Tensor, key: Tensor) -> Tensor:
    """(N, H, Tk, D) summed to (N, G, Tk, D)."""
    heads = key.shape[2]
    if gradient.shape[1] == heads:
        return gradient
    wide = sum_dtype(gradient.dtype)
    return gradient.unflatten(1, (heads, -1)).sum(2, dtype=wide).to(gradient.dtype)


def _mask(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    band_start: int | None,
    band_end: int | None,
) -> tuple[Tensor | None, bool]:
    """What to add to the scores (B * R or 1, H or 1, Tq, Tk), and whether to be causal."""
    batch, rows, _, num_queries, _ = query.shape
    simple = band_start is None and band_end in (None, 0)
    if bias is None and key_mask is None and simple:
        return None, band_end is not None
    dtype = query.dtype if bias is None else bias.dtype
    mask = query.new_zeros((1, 1, num_queries, key.shape[-2]), dtype=dtype)
    if bias is not None:
        mask = mask + bias
    if key_mask is not None:
        mask = mask.masked_fill(~key_mask.reshape(batch * rows, 1, 1, -1), -torch.inf)
    seen = visible(slice(0, num_queries), mask, band_start, band_end)
    return mask if seen is None else mask.masked_fill(~seen, -torch.inf), False


def _fused(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> str | None:
    """Which kernel on CUDA torch would take, of those that are worth it."""
    q, k, v = (rows_of(x) for x in (query, key, value))
    grouped = query.shape[2] != key.shape[2]
    choice = torch._fused_sdp_choice(q, k, v, None, 0.0, is_causal, enable_gqa=grouped)
    if choice == SDPBackend.CUDNN_ATTENTION.value:
        return "cudnn"
    old = torch.cuda.get_device_capability(query.device)[0] < _HOPPER
    # Torch pads other widths on the way to this kernel.
    fits = query.shape[-1] % 8 == 0
    return "flash" if choice == SDPBackend.FLASH_ATTENTION.value and old and fits else None


def _cudnn_forward(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, is_causal, False, scale=scale
    )
    return out, lse.reshape(query.shape[:-1])


def _cudnn_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    random = query.new_empty((), dtype=torch.int64)  # of the dropout that there is not
    lengths = (None, None, query.shape[-2], key.shape[-2])
    gradients: tuple[Tensor, Tensor, Tensor] = _aten._scaled_dot_product_cudnn_attention_backward(
        *(dout, query, key, value, out, lse.unsqueeze(-1), random, random, None),
        *(*lengths, 0.0, is_causal),
        scale=scale,
    )
    return gradients


def _flash_forward(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, is_causal, False, scale=scale
    )
    return out, lse


def _flash_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    random = query.new_empty(2, dtype=torch.int64)  # of the dropout that there is not
    lengths = (None, None, query.shape[-2], key.shape[-2])
    gradients: tuple[Tensor, Tensor, Tensor] = _aten._scaled_dot_product_flash_attention_backward(
        *(dout, query, key, value, out, lse, *lengths, 0.0, is_causal, random, random),
        scale=scale,
    )
    return gradients
