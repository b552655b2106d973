"""Calls of ``layer_norm``: odd ones for tests, those of models for machine code and benchmarks."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fivefold.kernels.ops.layer_norm import layer_norm
from fivefold.kernels.samples import Cost, Inputs, Maker, OpSamples, Peer, Sample


def _plain(*shape: int) -> Sample:
    width = shape[-1]

    def inputs(make: Maker) -> Inputs:
        return {
            "input": make.normal(*shape),
            "normalized_shape": (width,),
            "weight": make.normal(width),
            "bias": make.normal(width),
        }

    return Sample(name="x".join(map(str, shape)), inputs=inputs)


def _transposed(make: Maker) -> Inputs:
    """Columns of a pair representation: rows at two strides."""
    pair = make.normal(1, 3, 5, 20, grad=False)
    return {
        "input": pair.transpose(1, 2).requires_grad_(),
        "normalized_shape": (20,),
        "weight": make.normal(20),
    }


def _two_dims(make: Maker) -> Inputs:
    return {
        "input": make.normal(3, 2, 5),
        "normalized_shape": (2, 5),
        "weight": make.normal(2, 5),
        "bias": make.normal(2, 5),
        "eps": 0.1,
    }


def _far_from_zero(make: Maker) -> Inputs:
    """The variance must not be a difference of two large numbers."""
    x = make.normal(3, 70, grad=False)
    return {"input": (x + 30).requires_grad_(), "normalized_shape": (70,)}


def _bias_alone(make: Maker) -> Inputs:
    return {"input": make.normal(2, 3, 17), "normalized_shape": (17,), "bias": make.normal(17)}


def _weight_alone(make: Maker) -> Inputs:
    return {"input": make.normal(2, 3, 17), "normalized_shape": (17,), "weight": make.normal(17)}


def cost(inputs: Inputs) -> tuple[Cost, Cost]:
    """Forward reads x and writes y; backward reads x and dy and writes dx."""
    x = inputs["input"]
    rows = x.numel() * x.element_size()
    return Cost(bytes=2 * rows), Cost(bytes=3 * rows)


def _has_both(inputs: Inputs) -> bool:
    return inputs.get("weight") is not None and inputs.get("bias") is not None


def _liger(input: Tensor, normalized_shape: tuple[int, ...], **options: Any) -> Tensor:
    from liger_kernel.transformers.functional import liger_layer_norm

    return liger_layer_norm(input, options["weight"], options["bias"], eps=options.get("eps", 1e-5))


SAMPLES = OpSamples(
    name="layer_norm",
    function=layer_norm,
    eager=F.layer_norm,
    small=(
        _plain(37, 33),
        Sample(name="transposed", inputs=_transposed),
        Sample(name="two dims", inputs=_two_dims),
        Sample(name="bias alone", inputs=_bias_alone),
        Sample(name="weight alone", inputs=_weight_alone),
        Sample(name="far from zero", inputs=_far_from_zero),
        _plain(0, 8),
        _plain(3, 4),
    ),
    # AlphaFold's pair representation and its MSA, and a large transformer's rows.
    real=(_plain(1, 256, 256, 128), _plain(1, 128, 256, 256), _plain(4096, 4096)),
    laptop=(_plain(2048, 1024), _plain(8192, 256), _plain(1024, 4096), _plain(1, 128, 128, 128)),
    cost=cost,
    peers=(Peer(name="liger", function=_liger, takes=_has_both),),
)
