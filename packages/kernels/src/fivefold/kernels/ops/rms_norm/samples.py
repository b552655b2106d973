"""Calls of ``rms_norm``: odd ones for tests, those of models for machine code and benchmarks."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fivefold.kernels.ops.rms_norm import rms_norm
from fivefold.kernels.samples import Cost, Inputs, Maker, OpSamples, Peer, Sample


def _plain(rows: int, width: int) -> Sample:
    def inputs(make: Maker) -> Inputs:
        x, weight = make.normal(rows, width), make.normal(width)
        return {"input": x, "normalized_shape": (width,), "weight": weight, "eps": 1e-5}

    return Sample(name=f"{rows}x{width}", inputs=inputs)


def _gated(rows: int, width: int, group_size: int, *, gate_first: bool) -> Sample:
    def inputs(make: Maker) -> Inputs:
        return {
            "input": make.normal(rows, width),
            "normalized_shape": (width,),
            "weight": make.normal(width),
            "eps": 1e-5,
            "gate": make.normal(rows, width),
            "gate_first": gate_first,
            "group_size": group_size,
        }

    order = "first" if gate_first else "last"
    return Sample(name=f"{rows}x{width} groups of {group_size} gate {order}", inputs=inputs)


def _two_dims(make: Maker) -> Inputs:
    return {"input": make.normal(3, 2, 5), "normalized_shape": (2, 5), "weight": make.normal(2, 5)}


def _bare(make: Maker) -> Inputs:
    return {"input": make.normal(2, 3, 17), "normalized_shape": (17,)}


def cost(inputs: Inputs) -> tuple[Cost, Cost]:
    """Forward reads x and gate and writes y; backward reads dy too and writes both gradients."""
    x = inputs["input"]
    rows = x.numel() * x.element_size()
    gated = inputs.get("gate") is not None
    return Cost(bytes=rows * (3 if gated else 2)), Cost(bytes=rows * (5 if gated else 3))


def _is_gated(inputs: Inputs) -> bool:
    return inputs.get("gate") is not None


def _is_plain(inputs: Inputs) -> bool:
    return not _is_gated(inputs)


def _eager(input: Tensor, normalized_shape: tuple[int, ...], **options: Any) -> Tensor:
    """What a user of torch alone writes."""
    weight, eps, gate = options.get("weight"), options.get("eps"), options.get("gate")
    if gate is None:
        return F.rms_norm(input, normalized_shape, weight, eps)
    x = (input.float() * F.silu(gate.float())).unflatten(-1, (-1, options["group_size"]))
    normed = F.rms_norm(x, x.shape[-1:], None, eps).flatten(-2)
    return (normed if weight is None else normed * weight).to(input.dtype)


def _liger(input: Tensor, normalized_shape: tuple[int, ...], **options: Any) -> Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm

    return liger_rms_norm(input, options["weight"], options["eps"])


def _quack(input: Tensor, normalized_shape: tuple[int, ...], **options: Any) -> Tensor:
    from quack import rmsnorm

    return rmsnorm(input, options["weight"], eps=options["eps"])


def _mamba_ssm(input: Tensor, normalized_shape: tuple[int, ...], **options: Any) -> Tensor:
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    return rmsnorm_fn(
        input,
        options["weight"],
        None,
        z=options["gate"],
        eps=options["eps"],
        group_size=options["group_size"],
        norm_before_gate=not options["gate_first"],
    )


SAMPLES = OpSamples(
    name="rms_norm",
    function=rms_norm,
    small=(
        _plain(37, 33),
        _gated(5, 12, 3, gate_first=True),
        _gated(5, 36, 18, gate_first=False),
        Sample(name="two dims", inputs=_two_dims),
        Sample(name="bare", inputs=_bare),
        _plain(0, 8),
        _plain(3, 2),
    ),
    real=(
        _plain(4096, 4096),
        _plain(16384, 256),
        _gated(4096, 8192, 1024, gate_first=True),
    ),
    laptop=(
        _plain(2048, 1024),
        _plain(8192, 256),
        _plain(1024, 4096),
        _gated(1024, 2048, 256, gate_first=True),
    ),
    cost=cost,
    eager=_eager,
    peers=(
        Peer(name="liger", function=_liger, takes=_is_plain),
        Peer(name="quack", function=_quack, takes=_is_plain),
        Peer(name="mamba-ssm", function=_mamba_ssm, takes=_is_gated),
    ),
)
