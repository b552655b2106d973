"""Calls of ``cross_entropy``: odd ones for tests, those of models for kernels and benchmarks."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fivefold.kernels.ops.cross_entropy import cross_entropy
from fivefold.kernels.samples import Cost, Inputs, Maker, OpSamples, Peer, Sample


def _call(
    tokens: int, classes: int, *, weighted: bool = False, ignored: float = 0.0, **options: Any
) -> Callable[[Maker], Inputs]:
    """Random logits and targets, of which a part is ignored."""

    def inputs(make: Maker) -> Inputs:
        given: Inputs = {"input": make.normal(tokens, classes, scale=2)}
        target = make.integers(0, classes, tokens)
        if ignored:
            skip = make.booleans(tokens, true=ignored)
            target = target.masked_fill(skip, options.get("ignore_index", -100))
        given["target"] = target
        if weighted:
            given["weight"] = make.normal(classes, scale=0.3, grad=False).add_(1)
        return given | options

    return inputs


def _plain(tokens: int, classes: int) -> Sample:
    return Sample(name=f"{tokens}x{classes}", inputs=_call(tokens, classes))


def _one_token(make: Maker) -> Inputs:
    return {"input": make.normal(19), "target": make.values(3), "z_loss": 0.1}


def _impossible(label_smoothing: float) -> Callable[[Maker], Inputs]:
    """Classes that cannot be, the target of one token among them."""

    def inputs(make: Maker) -> Inputs:
        logits = make.normal(4, 300)
        with torch.no_grad():
            logits[:, 1:260] = -float("inf")
        target = make.values([0, 260, 299, 100])
        return {
            "input": logits,
            "target": target,
            "reduction": "none",
            "label_smoothing": label_smoothing,
        }

    return inputs


def cost(inputs: Inputs) -> tuple[Cost, Cost]:
    """Forward reads the logits; backward reads them again and writes their gradient."""
    logits = inputs["input"]
    size = logits.numel() * logits.element_size()
    return Cost(bytes=size), Cost(bytes=2 * size)


def _eager(input: Tensor, target: Tensor, z_loss: float = 0.0, **options: Any) -> Tensor:
    """What a user of torch alone writes."""
    logits = input.float()
    loss = F.cross_entropy(logits, target, **options)
    if z_loss:
        loss = loss + z_loss * torch.logsumexp(logits, -1).square().mean()
    return loss


def _liger(input: Tensor, target: Tensor, z_loss: float = 0.0, **options: Any) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy

    # It writes the gradient over the logits, which a comparison needs again.
    return liger_cross_entropy(input.clone(), target, lse_square_scale=z_loss, **options)


def _quack(input: Tensor, target: Tensor, **options: Any) -> Tensor:
    from quack import cross_entropy as quack_cross_entropy

    return quack_cross_entropy(input, target, **options)


def _quack_takes(inputs: Inputs) -> bool:
    return not inputs.get("z_loss") and not inputs.get("label_smoothing")


SAMPLES = OpSamples(
    name="cross_entropy",
    function=cross_entropy,
    small=(
        Sample(
            name="all at once",
            inputs=_call(
                7, 37, weighted=True, ignored=0.3, label_smoothing=0.1, z_loss=0.03, reduction="sum"
            ),
        ),
        _plain(5, 33),
        Sample(
            name="smoothed",
            inputs=_call(6, 45, ignored=0.3, label_smoothing=0.2, z_loss=0.1, reduction="none"),
        ),
        Sample(name="weighted", inputs=_call(6, 20, weighted=True, ignored=0.3)),
        # So far from the classes that to look it up is a fault.
        Sample(
            name="ignored far away",
            inputs=_call(
                9, 24, weighted=True, ignored=0.5, label_smoothing=0.1, ignore_index=-(1 << 40)
            ),
        ),
        Sample(name="ignored class", inputs=_call(9, 4, ignored=0.2, ignore_index=2)),
        Sample(
            name="longer than a tile",
            inputs=_call(2, 8229, ignored=0.1, label_smoothing=0.1, reduction="sum"),
        ),
        Sample(name="impossible classes", inputs=_impossible(0.0)),
        Sample(name="impossible classes smoothed", inputs=_impossible(0.1)),
        Sample(name="one token", inputs=_one_token),
        Sample(name="no tokens", inputs=_call(0, 8, reduction="sum")),
        Sample(name="one class", inputs=_call(3, 1)),
    ),
    real=(
        _plain(4096, 131072),
        _plain(4096, 32000),
        Sample(
            name="4096x32000 smoothed",
            inputs=_call(4096, 32000, label_smoothing=0.1, z_loss=1e-4),
        ),
    ),
    laptop=(_plain(64, 32000), _plain(16, 131072)),
    cost=cost,
    eager=_eager,
    peers=(
        Peer(name="liger", function=_liger),
        Peer(name="quack", function=_quack, takes=_quack_takes),
    ),
)
