"""Calls of ``ssd_scan``: odd ones for tests, those of models for machine code and benchmarks.

Legend: B batch, S tokens, H heads, P values in a head, G groups, N values of state, Q of a chunk.
"""

# ruff: noqa: N803, N806 - the paper's names A, B, C and D

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fivefold.hybrid_ssm.ops.ssd_scan import ssd_scan
from fivefold.hybrid_ssm.ops.ssd_scan.op import wide
from fivefold.kernels.samples import Cost, Inputs, Maker, OpSamples, Peer, Sample

# What the least work is counted with.
_CHUNK = 64


def _inputs(
    make: Maker, sizes: tuple[int, int, int, int, int, int], decay: float = 1.0
) -> dict[str, Any]:
    batch, num_tokens, num_heads, head_dim, num_groups, state = sizes
    return {
        "x": make.normal(batch, num_tokens, num_heads, head_dim),
        "dt": make.normal(batch, num_tokens, num_heads),
        "A": _negative(make, num_heads, decay),
        "B": make.normal(batch, num_tokens, num_groups, state),
        "C": make.normal(batch, num_tokens, num_groups, state),
    }


def _negative(make: Maker, count: int, scale: float) -> Tensor:
    A = make.normal(count, scale=scale, grad=False, dtype=wide(make.dtype))
    return A.abs_().neg_().requires_grad_()


def _model(
    name: str, sizes: tuple[int, int, int, int, int, int], chunk_size: int | None = None
) -> Sample:
    """As a Mamba-2 layer calls it."""

    def inputs(make: Maker) -> Inputs:
        heads = sizes[2]
        return _inputs(make, sizes) | {
            "D": make.normal(heads, dtype=wide(make.dtype)),
            "dt_bias": make.normal(heads, dtype=wide(make.dtype)),
            "dt_softplus": True,
            "chunk_size": chunk_size,
        }

    return Sample(name=name, inputs=inputs)


def _all(
    name: str,
    sizes: tuple[int, int, int, int, int, int],
    seq_ids: list[list[int]],
    chunk_size: int | None = None,
) -> Sample:
    """With all there is."""

    def inputs(make: Maker) -> Inputs:
        batch, _, heads, head_dim, _, state = sizes
        compute = wide(make.dtype)
        return _inputs(make, sizes) | {
            "D": make.normal(heads, dtype=compute),
            "z": make.normal(*sizes[:4]),
            "dt_bias": make.normal(heads, dtype=compute),
            "dt_softplus": True,
            "dt_limit": (0.2, 1.5),
            "initial_state": make.normal(batch, heads, head_dim, state, dtype=compute),
            "seq_ids": make.values(seq_ids),
            "chunk_size": chunk_size,
            "return_final_state": True,
        }

    return Sample(name=name, inputs=inputs)


def _strong_decay(make: Maker) -> Inputs:
    """The state is lost and what follows decays slowly; two steps are exactly at the limits."""
    inputs = _inputs(make, (1, 18, 2, 4, 2, 4), decay=40.0)
    dt = inputs["dt"].detach()
    dt.abs_()
    dt[:, :9].add_(8)
    dt[:, 9:].mul_(0.02)
    dt[:, 3], dt[:, 11] = 8.5, 0.0
    inputs["dt"] = dt.requires_grad_()
    return inputs | {"dt_limit": (0.0, 8.5), "return_final_state": True}


def _bare(name: str, sizes: tuple[int, int, int, int, int, int], **options: Any) -> Sample:
    return Sample(name=name, inputs=lambda make: _inputs(make, sizes) | options)


def cost(inputs: Inputs) -> tuple[Cost, Cost]:
    """Reads x, dt, B and C and writes y; backward reads dy too and writes their gradients."""
    x, B = inputs["x"], inputs["B"]
    tokens = x.shape[0] * x.shape[1]
    heads, head_dim = x.shape[2:]
    groups, state = B.shape[2:]
    moved = x.numel() + 2 * B.numel() + inputs["dt"].numel()
    # A state's update and its product with C; half of the pairs of tokens of a chunk.
    products = heads * (4 * state * head_dim + _CHUNK * head_dim) + groups * _CHUNK * state
    forward = Cost(bytes=(moved + x.numel()) * x.element_size(), flops=tokens * products)
    backward = Cost(
        bytes=(2 * moved + x.numel()) * x.element_size(),
        flops=round(2.5 * tokens * products),
    )
    return forward, backward


def eager(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """What a user of torch alone writes: batched products for all chunks, then a loop over them."""
    dt_bsh = dt.float() if options.get("dt_bias") is None else dt.float() + options["dt_bias"]
    dt_bsh = F.softplus(dt_bsh) if options.get("dt_softplus") else dt_bsh
    dt_bsh = dt_bsh.clamp(*options.get("dt_limit", (0.0, math.inf)))
    num_tokens, per_group = x.shape[1], x.shape[2] // B.shape[2]
    chunk = min(options.get("chunk_size") or 128, num_tokens)
    pad = -num_tokens % chunk
    x_bchqp = _chunked(x.float() * dt_bsh.unsqueeze(-1), pad, chunk)
    B_bchqn = _chunked(B.float().repeat_interleave(per_group, 2), pad, chunk)
    C_bchqn = _chunked(C.float().repeat_interleave(per_group, 2), pad, chunk)
    logs_bchq = _chunked((dt_bsh * A).unsqueeze(-1), pad, chunk).squeeze(-1).cumsum(-1)
    between = logs_bchq.unsqueeze(-1) - logs_bchq.unsqueeze(-2)
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    weights = (C_bchqn @ B_bchqn.mT) * between.masked_fill(later, -math.inf).exp()
    y_bchqp = weights @ x_bchqp
    to_end = (logs_bchq[..., -1:] - logs_bchq).exp().unsqueeze(-1)
    added = (x_bchqp * to_end).mT @ B_bchqn
    state = options.get("initial_state")
    state = torch.zeros_like(added[:, 0]) if state is None else state
    carried = []
    for index in range(y_bchqp.shape[1]):
        logs = logs_bchq[:, index].unsqueeze(-1)
        carried.append((C_bchqn[:, index] @ state.mT) * logs.exp())
        state = state * logs[:, :, -1:].exp() + added[:, index]
    y = (y_bchqp + torch.stack(carried, 1)).transpose(2, 3).flatten(1, 2)[:, :num_tokens]
    if options.get("D") is not None:
        y = y + options["D"].unsqueeze(-1) * x
    if options.get("z") is not None:
        y = y * F.silu(options["z"].float())
    return (y.to(x.dtype), state) if options.get("return_final_state") else y.to(x.dtype)


def _chunked(x_bshv: Tensor, pad: int, chunk: int) -> Tensor:
    """(B, S, H, values) to (B, chunks, H, Q, values)."""
    return F.pad(x_bshv, (0, 0, 0, 0, 0, pad)).unflatten(1, (-1, chunk)).transpose(2, 3)


def _mamba_ssm(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **options: Any) -> Any:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined(x, dt, A, B, C, **_theirs(options))


def _transformers(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **options: Any) -> Any:
    from transformers.models.nemotron_h import modeling_nemotron_h

    return modeling_nemotron_h.mamba2_chunk_scan(x, dt, A, B, C, **_theirs(options))


def _theirs(options: dict[str, Any]) -> dict[str, Any]:
    named = {"D", "dt_bias", "dt_softplus", "dt_limit"} & options.keys()
    return {name: options[name] for name in named} | {
        "chunk_size": options.get("chunk_size") or 256
    }


def _is_plain(inputs: Inputs) -> bool:
    odd = ("z", "initial_state", "seq_ids")
    return all(inputs.get(name) is None for name in odd) and not inputs.get("return_final_state")


SAMPLES = OpSamples(
    name="ssd_scan",
    function=ssd_scan,
    eager=eager,
    small=(
        _all("all", (1, 19, 2, 5, 1, 9), [[0] * 11 + [4] * 6 + [0] * 2], 16),
        _bare("bare", (2, 17, 4, 3, 2, 5), chunk_size=16),
        _all("two sequences", (2, 9, 2, 4, 2, 4), [[5] * 9, [5] * 4 + [6] * 5]),
        Sample(name="strong decay", inputs=_strong_decay),
        # What the backends cut in pieces: 9 heads of a group, 34 chunks, wide heads and states.
        _all("blocks and segments", (1, 34, 9, 2, 1, 3), [[0] * 33 + [1]], 1),
        _bare("wide", (1, 17, 1, 17, 1, 130), chunk_size=16),
        _bare("one token", (2, 1, 2, 3, 1, 5), return_final_state=True),
        _bare("no sequence", (0, 9, 2, 3, 1, 4), return_final_state=True),
    ),
    real=(
        _model("Nemotron-H 8B", (1, 8192, 128, 64, 8, 128)),
        _model("Nemotron-H 56B", (1, 8192, 256, 64, 8, 256)),
        _model("Nemotron Nano 2 9B", (1, 8192, 128, 80, 8, 128)),
        _model("Mamba-2 2.7B", (8, 2048, 80, 64, 1, 128)),
    ),
    laptop=(
        _model("64 heads", (1, 512, 64, 64, 8, 128)),
        _model("16 heads", (1, 1024, 16, 64, 2, 128)),
        _model("one group", (2, 512, 24, 64, 1, 128)),
    ),
    cost=cost,
    peers=(
        Peer(name="mamba-ssm", function=_mamba_ssm, takes=_is_plain),
        Peer(name="transformers", function=_transformers, takes=_is_plain),
    ),
    tensor_cores=True,
)
