"""Calls of ``linear_cross_entropy``: odd ones for tests, those of models for benchmarks."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fivefold.kernels.ops.linear_cross_entropy import linear_cross_entropy
from fivefold.kernels.samples import Cost, Inputs, Maker, OpSamples, Peer, Sample


def _call(
    tokens: int,
    classes: int,
    width: int,
    *,
    biased: bool = False,
    weighted: bool = False,
    ignored: float = 0.0,
    **options: Any,
) -> Callable[[Maker], Inputs]:
    """Random features and targets, of which a part is ignored."""

    def inputs(make: Maker) -> Inputs:
        given: Inputs = {
            "input": make.normal(tokens, width),
            "linear_weight": make.normal(classes, width, scale=max(width, 1) ** -0.5),
        }
        target = make.integers(0, classes, tokens)
        given["target"] = target
        if ignored:
            given["target"] = target.masked_fill(make.booleans(tokens, true=ignored), -100)
        if biased:
            given["linear_bias"] = make.normal(classes)
        if weighted:
            given["weight"] = make.normal(classes, scale=0.3, grad=False).add_(1)
        return given | options

    return inputs


def _plain(tokens: int, classes: int, width: int) -> Sample:
    return Sample(name=f"{tokens}x{classes}x{width}", inputs=_call(tokens, classes, width))


def _frozen(make: Maker) -> Inputs:
    """A head that is not trained."""
    return {
        "input": make.normal(2, 3, 8),
        "linear_weight": make.normal(11, 8, grad=False),
        "target": make.integers(0, 11, 2, 3),
    }


def _frozen_input(make: Maker) -> Inputs:
    return {
        "input": make.normal(8, grad=False),
        "linear_weight": make.normal(11, 8, grad=False),
        "linear_bias": make.normal(11),
        "target": make.values(3),
        "reduction": "none",
    }


def cost(inputs: Inputs) -> tuple[Cost, Cost]:
    """One product forward and two backward; inputs are read and gradients written."""
    x, weight = inputs["input"], inputs["linear_weight"]
    size = (x.numel() + weight.numel()) * x.element_size()
    product = 2 * x.numel() * weight.shape[0]
    return Cost(bytes=size, flops=product), Cost(bytes=2 * size, flops=2 * product)


def _eager(
    input: Tensor, linear_weight: Tensor, target: Tensor, z_loss: float = 0.0, **options: Any
) -> Tensor:
    """What a user of torch alone writes."""
    logits = F.linear(input, linear_weight).float()
    loss = F.cross_entropy(logits, target, **options)
    if z_loss:
        loss = loss + z_loss * torch.logsumexp(logits, -1).square().mean()
    return loss


def _torch_chunked(input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    from torch.nn import LinearCrossEntropyOptions

    return F.linear_cross_entropy(
        input, linear_weight, target, options=LinearCrossEntropyOptions(), **options
    )


def _torch_chunked_takes(inputs: Inputs) -> bool:
    return hasattr(F, "linear_cross_entropy") and not inputs.get("z_loss")


def _liger(input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    z_loss = options.pop("z_loss", 0.0)
    return liger_fused_linear_cross_entropy(
        input, linear_weight, target, lse_square_scale=z_loss, **options
    )


SAMPLES = OpSamples(
    name="linear_cross_entropy",
    function=linear_cross_entropy,
    small=(
        Sample(
            name="all at once",
            inputs=_call(
                7, 37, 12, biased=True, weighted=True, ignored=0.3, label_smoothing=0.1, z_loss=0.03
            ),
        ),
        Sample(
            name="a loss a token",
            inputs=_call(
                *(7, 33, 5), biased=True, ignored=0.3, label_smoothing=0.2, reduction="none"
            ),
        ),
        Sample(name="sum", inputs=_call(5, 20, 8, reduction="sum")),
        Sample(name="frozen head", inputs=_frozen),
        Sample(name="bias alone", inputs=_frozen_input),
        Sample(name="no tokens", inputs=_call(0, 9, 4, reduction="sum")),
        Sample(name="no features", inputs=_call(3, 9, 0)),
    ),
    real=(_plain(4096, 131072, 4096), _plain(4096, 32000, 4096)),
    laptop=(_plain(64, 32000, 128),),
    cost=cost,
    eager=_eager,
    peers=(
        Peer(name="liger", function=_liger),
        Peer(name="torch chunked", function=_torch_chunked, takes=_torch_chunked_takes),
    ),
)
