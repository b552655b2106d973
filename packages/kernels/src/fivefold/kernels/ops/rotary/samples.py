"""Calls of ``rotary``: odd ones for tests, those of models for machine code and benchmarks."""

from typing import Any

import torch
from torch import Tensor

from fivefold.kernels.ops.rotary import rotary
from fivefold.kernels.samples import Cost, Inputs, Maker, OpSamples, Peer, Sample


def _of(*shape: int, rotated: int, by_sequence: bool = False, **options: bool) -> Sample:
    """Of x's shape; angles are any numbers, since the op takes cos and sin as they are."""
    num_tokens = shape[-2 if options.get("heads_first") else -3]
    table = (*(shape[:-3] if by_sequence else ()), num_tokens, rotated // 2)

    def inputs(make: Maker) -> Inputs:
        cos, sin = make.normal(*table, grad=False), make.normal(*table, grad=False)
        return {"x": make.normal(*shape), "cos": cos, "sin": sin, **options}

    words = [*options, *(["by sequence"] if by_sequence else [])]
    return Sample(
        name=" ".join(["x".join(map(str, shape)), f"of {rotated}", *words]), inputs=inputs
    )


def _packed(batch: int, num_tokens: int, num_heads: int, head_dim: int) -> Sample:
    """Queries in a packed projection, and a table whose halves are the same."""

    def inputs(make: Maker) -> Inputs:
        qkv = make.normal(batch, num_tokens, 3, num_heads, head_dim)
        cos, sin = (make.normal(num_tokens, head_dim, grad=False) for _ in range(2))
        half = head_dim // 2
        return {"x": qkv[:, :, 0], "cos": cos[:, :half], "sin": sin[:, :half]}

    return Sample(name=f"{batch}x{num_tokens}x{num_heads}x{head_dim} of qkv", inputs=inputs)


def cost(inputs: Inputs) -> tuple[Cost, Cost]:
    """Both ways read x and the angles and write y."""
    x, cos = inputs["x"], inputs["cos"]
    moved = 2 * x.numel() * x.element_size() + 2 * cos.numel() * cos.element_size()
    return Cost(bytes=moved), Cost(bytes=moved)


def _eager(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, heads_first: bool = False
) -> Tensor:
    """What a user of torch alone writes."""
    heads, num_rotated = (-3 if heads_first else -2), 2 * cos.shape[-1]
    rotated, passed = x[..., :num_rotated], x[..., num_rotated:]
    if interleaved:
        cos, sin = (each.repeat_interleave(2, dim=-1).unsqueeze(heads) for each in (cos, sin))
        turned = torch.stack((-rotated[..., 1::2], rotated[..., 0::2]), dim=-1).flatten(-2)
    else:
        cos, sin = (torch.cat((each, each), dim=-1).unsqueeze(heads) for each in (cos, sin))
        a, b = rotated.chunk(2, dim=-1)
        turned = torch.cat((-b, a), dim=-1)
    y = rotated * cos + turned * sin
    return torch.cat((y, passed), dim=-1) if passed.shape[-1] else y


def _flash_attn(x: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> Tensor:
    from flash_attn.layers.rotary import apply_rotary_emb

    return apply_rotary_emb(x, cos, sin, interleaved=options.get("interleaved", False))


def _takes_flash_attn(inputs: Inputs) -> bool:
    return inputs["x"].dim() == 4 and inputs["cos"].dim() == 2 and "heads_first" not in inputs


SAMPLES = OpSamples(
    name="rotary",
    function=rotary,
    small=(
        _of(2, 5, 3, 8, rotated=8),
        _of(2, 5, 3, 12, rotated=6, interleaved=True, by_sequence=True),
        _of(2, 3, 5, 11, rotated=4, heads_first=True, by_sequence=True),
        _packed(2, 3, 5, 6),
        _of(3, 5, 6, rotated=6, interleaved=True, heads_first=True),
        _of(2, 1, 130, 1, 20, rotated=20),
        _of(2, 3, 70, rotated=68),
        _of(2, 3, 36, rotated=34, interleaved=True),
        _of(3, 2, 5, rotated=0),
        _of(2, 0, 3, 4, rotated=4),
        _of(0, 3, 2, 4, rotated=2, by_sequence=True),
    ),
    real=(
        _of(1, 4096, 32, 128, rotated=128),
        _of(2, 4096, 8, 128, rotated=64, interleaved=True),
        _packed(1, 4096, 32, 128),
        _of(1, 32, 4096, 64, rotated=32, heads_first=True),
    ),
    laptop=(
        _of(1, 512, 16, 128, rotated=128),
        _of(1, 512, 16, 128, rotated=128, interleaved=True),
        _packed(1, 512, 16, 128),
        _of(1, 16, 512, 128, rotated=64, heads_first=True),
    ),
    cost=cost,
    eager=_eager,
    peers=(Peer(name="flash-attn", function=_flash_attn, takes=_takes_flash_attn),),
)
