"""Calls of ``attention``: odd ones for tests, those of models for machine code and benchmarks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fivefold.kernels.ops.attention import attention
from fivefold.kernels.ops.attention.shapes import Options
from fivefold.kernels.samples import Cost, Inputs, Maker, OpSamples, Peer, Sample


def _sample(
    name: str,
    lead: tuple[int, ...],
    *,
    heads: tuple[int, int],
    lengths: tuple[int, int],
    widths: tuple[int, int],
    bias: tuple[int, ...] | None = None,
    masked: bool = False,
    dtypes: tuple[torch.dtype, ...] | None = None,
    **options: Any,
) -> Sample:
    """Heads and lengths of query and key, widths of key and value."""

    def inputs(make: Maker) -> Inputs:
        found = {
            "query": make.normal(*lead, heads[0], lengths[0], widths[0]),
            "key": make.normal(*lead, heads[1], lengths[1], widths[0]),
            "value": make.normal(*lead, heads[1], lengths[1], widths[1]),
            "bias": None if bias is None else make.normal(*bias),
            "key_mask": make.booleans(*lead, lengths[1], true=0.7) if masked else None,
        }
        return found | options

    return Sample(name=name, inputs=inputs, dtypes=dtypes)


def _model(
    name: str, lead: tuple[int, ...], heads: int, keys: int, length: int, width: int, **more: Any
) -> Sample:
    """Operands as models have them: heads side by side, then seen from outside."""

    def inputs(make: Maker) -> Inputs:
        def operand(count: int) -> Tensor:
            x = make.normal(*lead, length, count, width, grad=False).transpose(-3, -2)
            return x.requires_grad_()

        found = {"query": operand(heads), "key": operand(keys), "value": operand(keys)}
        options = dict(more)
        if "bias" in options:
            found["bias"] = make.normal(*options.pop("bias"))
        return found | options

    return Sample(name=name, inputs=inputs)


def cost(inputs: Inputs) -> tuple[Cost, Cost]:
    """Two products of the scores that are seen forward and five backward.

    Backward also reads the result and its gradient and writes three gradients, or four.
    """
    query, key, value = (inputs[name] for name in ("query", "key", "value"))
    out_bytes = query.numel() // query.shape[-1] * value.shape[-1] * query.element_size()
    bias = inputs.get("bias")
    operands = [query, key, value] + ([] if bias is None else [bias])
    read = sum(x.numel() * x.element_size() for x in operands)
    pairs = query.shape[:-2].numel() * _seen_pairs(inputs)
    width, value_width = query.shape[-1], value.shape[-1]
    return (
        Cost(bytes=read + out_bytes, flops=2 * pairs * (width + value_width)),
        Cost(bytes=2 * read + 2 * out_bytes, flops=2 * pairs * (3 * width + 2 * value_width)),
    )


def _seen_pairs(inputs: Inputs) -> int:
    """How many pairs of a query and a key the causal band of one head has."""
    num_queries, num_keys = inputs["query"].shape[-2], inputs["key"].shape[-2]
    start, end = Options(
        is_causal=inputs.get("is_causal", False),
        causal_offset=inputs.get("causal_offset", 0),
        window=inputs.get("window"),
    ).band()
    pairs = 0
    for query in range(num_queries):
        first = 0 if start is None else max(0, query + start)
        last = num_keys if end is None else min(num_keys, query + end + 1)
        pairs += max(0, last - first)
    return pairs


def eager(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """What a user of torch alone writes: one mask of all that hides a key."""
    mask = options.get("bias")
    if options.get("key_mask") is not None:
        hidden = torch.zeros_like(options["key_mask"], dtype=query.dtype)
        hidden = hidden.masked_fill(~options["key_mask"], -torch.inf)[..., None, None, :]
        mask = hidden if mask is None else mask + hidden
    is_causal = options.get("is_causal", False)
    simple = not options.get("causal_offset") and options.get("window") is None and mask is None
    if is_causal and not simple:
        seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device)
        offset = options.get("causal_offset", 0)
        seen = seen.tril(offset)
        if options.get("window") is not None:
            seen = seen.triu(offset - options["window"] + 1)
        hidden = torch.zeros_like(seen, dtype=query.dtype).masked_fill(~seen, -torch.inf)
        mask = hidden if mask is None else mask + hidden
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        mask,
        is_causal=is_causal and simple,
        scale=options.get("scale"),
        enable_gqa=query.shape[-3] != key.shape[-3],
    )


def _flash_attn(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    from flash_attn import flash_attn_func

    window = options.get("window")
    out: Tensor = flash_attn_func(
        *(x.transpose(-3, -2) for x in (query, key, value)),
        softmax_scale=options.get("scale"),
        causal=options.get("is_causal", False),
        window_size=(-1, -1) if window is None else (window - 1, 0),
    )
    return out.transpose(-3, -2)


def _flash_attn_takes(inputs: Inputs) -> bool:
    plain = inputs.get("bias") is None and inputs.get("key_mask") is None
    return plain and not inputs.get("causal_offset") and inputs["query"].dim() == 4


def _cuequivariance(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, **options: Any
) -> Tensor:
    from cuequivariance_torch import triangle_attention

    mask = options.get("key_mask")
    if mask is not None:
        mask = mask[..., None, None, :]
    out: Tensor = triangle_attention(query, key, value, bias, mask, options.get("scale"))
    return out


def _cuequivariance_takes(inputs: Inputs) -> bool:
    has_bias = inputs.get("bias") is not None and inputs["query"].dim() == 5
    return has_bias and not inputs.get("is_causal")


SAMPLES = OpSamples(
    name="attention",
    function=attention,
    small=(
        _sample("causal", (), heads=(2, 1), lengths=(37, 37), widths=(8, 8), is_causal=True),
        _sample(
            "a bias that rows share, a mask of keys",
            (2, 2),
            heads=(2, 2),
            lengths=(5, 7),
            widths=(8, 8),
            bias=(2, 1, 2, 5, 7),
            masked=True,
            return_lse=True,
        ),
        _sample(
            "window",
            (),
            heads=(1, 1),
            lengths=(70, 107),
            widths=(8, 16),
            is_causal=True,
            causal_offset=46,
            window=67,
        ),
        _sample(
            "queries that see nothing",
            (2,),
            heads=(2, 1),
            lengths=(67, 34),
            widths=(5, 3),
            is_causal=True,
            causal_offset=-11,
            return_lse=True,
            dtypes=(torch.float64,),
        ),
        _sample(
            "a bias of keys",
            (2,),
            heads=(2, 1),
            lengths=(33, 34),
            widths=(4, 4),
            bias=(34,),
            dtypes=(torch.float32,),
            is_causal=True,
            causal_offset=3,
            window=20,
            return_lse=True,
        ),
        _sample(
            "a bias of queries",
            (1, 2),
            heads=(1, 1),
            lengths=(70, 67),
            widths=(4, 4),
            bias=(1, 70, 1),
            dtypes=(torch.float32,),
            return_lse=True,
        ),
        _sample(
            "one query, a cache of keys",
            (2,),
            heads=(2, 1),
            lengths=(1, 40),
            widths=(16, 16),
            is_causal=True,
            causal_offset=39,
        ),
        _sample(
            "no queries",
            (2,),
            heads=(2, 1),
            lengths=(0, 3),
            widths=(8, 8),
            bias=(2, 0, 3),
            return_lse=True,
            dtypes=(torch.float32,),
        ),
        _sample(
            "no keys",
            (2,),
            heads=(2, 1),
            lengths=(3, 0),
            widths=(8, 8),
            return_lse=True,
            dtypes=(torch.float32,),
        ),
        _sample(
            "no batch",
            (0,),
            heads=(2, 1),
            lengths=(3, 4),
            widths=(8, 8),
            bias=(2, 3, 4),
            dtypes=(torch.float32,),
        ),
    ),
    real=(
        _model("language model", (4,), 32, 8, 4096, 128, is_causal=True),
        _model("long, width 64", (1,), 16, 16, 16384, 64, is_causal=True),
        _model("window of Mixtral", (1,), 32, 8, 8192, 128, is_causal=True, window=4096),
        _model("MSA row", (1, 128), 8, 8, 256, 32, bias=(1, 1, 8, 256, 256)),
        _model("triangle", (1, 256), 4, 4, 256, 32, bias=(1, 1, 4, 256, 256)),
    ),
    laptop=(
        _model("language model", (1,), 8, 2, 512, 64, is_causal=True),
        _model("MSA row", (1, 8), 4, 4, 128, 32, bias=(1, 1, 4, 128, 128)),
    ),
    cost=cost,
    eager=eager,
    peers=(
        Peer(name="flash-attn", function=_flash_attn, takes=_flash_attn_takes),
        Peer(name="cuequivariance", function=_cuequivariance, takes=_cuequivariance_takes),
    ),
    tensor_cores=True,
)
