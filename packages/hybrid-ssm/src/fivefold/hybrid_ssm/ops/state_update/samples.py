"""Calls of ``state_update``: odd ones for tests, those of models for benchmarks.

Legend: B batch, H heads, P values in a head, G groups, N values of state.
"""

# ruff: noqa: N803, N806 - the paper's names A, B, C and D

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fivefold.hybrid_ssm.ops.state_update import state_update
from fivefold.hybrid_ssm.ops.state_update.op import wide
from fivefold.kernels.samples import Cost, Inputs, Maker, OpSamples, Peer, Sample


def _inputs(make: Maker, sizes: tuple[int, int, int, int, int]) -> Inputs:
    # Without gradients, which go through ssd_scan.
    batch, heads, head_dim, groups, state = sizes
    compute = wide(make.dtype)
    return {
        "state": make.normal(batch, heads, head_dim, state, grad=False, dtype=compute),
        "x": make.normal(batch, heads, head_dim, grad=False),
        "dt": make.normal(batch, heads, grad=False),
        "A": make.normal(heads, grad=False, dtype=compute),
        "B": make.normal(batch, groups, state, grad=False),
        "C": make.normal(batch, groups, state, grad=False),
    }


def _model(name: str, sizes: tuple[int, int, int, int, int], **options: Any) -> Sample:
    def inputs(make: Maker) -> Inputs:
        compute = wide(make.dtype)
        return _inputs(make, sizes) | {
            "D": make.normal(sizes[1], grad=False, dtype=compute),
            "dt_bias": make.normal(sizes[1], grad=False, dtype=compute),
            "dt_softplus": True,
            **options,
        }

    return Sample(name=name, inputs=inputs)


def _all(make: Maker) -> Inputs:
    sizes = (2, 6, 17, 3, 9)
    inputs = _model("", sizes, dt_limit=(0.3, 1.0)).inputs(make)
    return inputs | {"z": make.normal(*sizes[:3], grad=False)}


def _large_steps(make: Maker) -> Inputs:
    inputs = _model("", (1, 3, 2, 1, 20)).inputs(make)
    inputs["dt"].mul_(30)
    return inputs


def cost(inputs: Inputs) -> tuple[Cost, Cost]:
    """Reads and writes the state."""
    state = inputs["state"]
    return Cost(bytes=2 * state.numel() * state.element_size()), Cost(bytes=0)


def _eager(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    per_group = x.shape[1] // B.shape[1]
    dt_bh = dt if options.get("dt_bias") is None else dt + options["dt_bias"]
    dt_bh = F.softplus(dt_bh) if options.get("dt_softplus") else dt_bh
    dt_bh = dt_bh.clamp(*options.get("dt_limit", (0.0, math.inf)))
    B_bhn, C_bhn = (each.repeat_interleave(per_group, 1) for each in (B, C))
    state = state * torch.exp(dt_bh * A)[..., None, None]
    state = state + (dt_bh.unsqueeze(-1) * x).unsqueeze(-1) * B_bhn.unsqueeze(2)
    y = (state @ C_bhn.to(state.dtype).unsqueeze(-1)).squeeze(-1)
    y = y if options.get("D") is None else y + options["D"].unsqueeze(-1) * x
    y = y if options.get("z") is None else y * F.silu(options["z"])
    return y.to(x.dtype), state


def _mamba_ssm(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **options: Any
) -> Any:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    heads, head_dim, width = state.shape[1:]
    state = state.clone()
    D, bias = (options.get(name) for name in ("D", "dt_bias"))
    y = selective_state_update(
        state,
        x,
        dt.unsqueeze(-1).expand(-1, -1, head_dim),
        A.view(heads, 1, 1).expand(-1, head_dim, width),
        B,
        C,
        D=None if D is None else D.unsqueeze(-1).expand(-1, head_dim),
        z=options.get("z"),
        dt_bias=None if bias is None else bias.unsqueeze(-1).expand(-1, head_dim),
        dt_softplus=options.get("dt_softplus", False),
    )
    return y, state


SAMPLES = OpSamples(
    name="state_update",
    function=state_update,
    eager=_eager,
    small=(
        Sample(name="all", inputs=_all),
        Sample(name="bare", inputs=lambda make: _inputs(make, (1, 4, 17, 2, 16))),
        Sample(name="large steps", inputs=_large_steps),
        _model("no sequence", (0, 2, 3, 1, 4)),
    ),
    real=(
        _model("Nemotron-H 8B", (64, 128, 64, 8, 128)),
        _model("Nemotron-H 56B, one sequence", (1, 256, 64, 8, 256)),
    ),
    laptop=(
        _model("one sequence", (1, 64, 64, 8, 128)),
        _model("eight sequences", (8, 16, 64, 2, 128)),
    ),
    cost=cost,
    peers=(Peer(name="mamba-ssm", function=_mamba_ssm),),
)
