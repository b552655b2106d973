"""Calls of ``adamw_step`` after ``gradient_norm``: odd ones for tests, models' for measuring.

A buffer of each kind of value is cut into tensors of some sizes.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from fivefold.kernels.ops.adamw import adamw_settings, adamw_step, gradient_norm
from fivefold.kernels.samples import Cost, Inputs, Maker, OpSamples, Peer, Sample

Results = tuple[Tensor, ...]

_STATES = ("param", "grad", "exp_avg", "exp_avg_sq", "master", "average")
_MAX_NORM = 1.5
_LR, _BETAS, _EPS, _WEIGHT_DECAY, _AVERAGE_DECAY = 0.1, (0.8, 0.9), 1e-4, 0.3, 0.7


@wraps(adamw_step)
def step(*, in_place: bool = False, backend: str | None = None, **inputs: Any) -> Results:
    """Clip and step; gives the norm and all that the step wrote.

    Unless it works ``in_place``, the buffers are then as they were before.
    """
    if in_place:
        return _step(backend=backend, **inputs)
    before = {name: inputs[name].clone() for name in _STATES if name in inputs}
    results = tuple(each.clone() for each in _step(backend=backend, **inputs))
    for name, values in before.items():
        inputs[name].copy_(values)
    return results


def _step(
    *,
    sizes: Sequence[int],
    steps: Sequence[float],
    scale: float | None = None,
    backend: str | None = None,
    **inputs: Any,
) -> Results:
    tensors = _Tensors(sizes, steps, inputs)
    norm = gradient_norm(tensors["grad"], backend)
    factor = _clip_factor(norm) if scale is None else norm * 0 + scale
    adamw_step(
        tensors["param"],
        tensors["grad"],
        tensors["exp_avg"],
        tensors["exp_avg_sq"],
        tensors.counts,
        adamw_settings(_LR, _BETAS, _EPS, _WEIGHT_DECAY, _AVERAGE_DECAY, norm.device),
        masters=tensors["master"],
        averages=tensors["average"],
        average_counts=tensors.average_counts,
        scale=factor,
        maximize=inputs.get("maximize", False),
        swa=inputs.get("swa", False),
        skip_nonfinite=inputs.get("skip_nonfinite", False),
        backend=backend,
    )
    return (norm, *tensors.written())


class _Tensors:
    """The buffers of a call, cut."""

    def __init__(self, sizes: Sequence[int], steps: Sequence[float], inputs: Inputs):
        self._buffers = {name: inputs[name] for name in _STATES if name in inputs}
        self._sizes = sizes
        device = inputs["param"].device
        self.counts = [torch.full((), step, dtype=torch.float32, device=device) for step in steps]
        averaged = self.counts if "average" in inputs else []
        self.average_counts = [count.clone() for count in averaged]

    def __getitem__(self, name: str) -> list[Tensor]:
        if name not in self._buffers:
            return []
        buffer, stops = self._buffers[name], accumulate(self._sizes)
        return [buffer[stop - size : stop] for stop, size in zip(stops, self._sizes, strict=True)]

    def written(self) -> list[Tensor]:
        """All that a step writes."""
        buffers = [buffer for name, buffer in self._buffers.items() if name != "grad"]
        return [*buffers, *self.counts, *self.average_counts]


def _torch(*, fused: bool) -> Callable[..., Results]:
    """What a user of torch alone writes: a pass for each thing that is asked for."""

    @torch.no_grad()
    def step(*, sizes: Sequence[int], steps: Sequence[float], **inputs: Any) -> Results:
        tensors = _Tensors(sizes, steps, inputs)
        grads, weights = tensors["grad"], tensors["master"] or tensors["param"]
        norm = torch.nn.utils.get_total_norm(grads, foreach=True)
        torch._foreach_mul_(grads, _clip_factor(norm))
        adamw(
            weights,
            [each.to(weights[0].dtype) for each in grads],
            tensors["exp_avg"],
            tensors["exp_avg_sq"],
            [],
            tensors.counts,
            foreach=not fused,
            fused=fused,
            amsgrad=False,
            maximize=False,
            lr=_LR,
            beta1=_BETAS[0],
            beta2=_BETAS[1],
            eps=_EPS,
            weight_decay=_WEIGHT_DECAY,
        )
        if tensors["master"]:
            torch._foreach_copy_(tensors["param"], weights)
        if tensors["average"]:
            torch._foreach_lerp_(tensors["average"], weights, 1 - _AVERAGE_DECAY)
            torch._foreach_add_(tensors.average_counts, 1)
        return (norm, *tensors.written())

    return step


def _clip_factor(norm: Tensor) -> Tensor:
    return (_MAX_NORM / (norm + 1e-6)).clamp(max=1)


def _sample(
    name: str,
    sizes: Sequence[int],
    *,
    master: bool = False,
    average: bool = True,
    dtypes: tuple[torch.dtype, ...] | None = None,
    step: float | None = None,
    **options: Any,
) -> Sample:
    num = sum(sizes)

    def inputs(make: Maker) -> Inputs:
        wide = torch.promote_types(make.dtype, torch.float32)
        moment = wide if master else make.dtype
        made = {
            "sizes": tuple(sizes),
            "steps": tuple(i % 3 if step is None else step for i in range(len(sizes))),
            "param": make.normal(num, grad=False),
            "grad": make.normal(num, grad=False),
            "exp_avg": make.normal(num, grad=False, dtype=moment),
            "exp_avg_sq": make.normal(num, grad=False, dtype=moment).abs_(),
        }
        if master:
            made["master"] = make.normal(num, grad=False, dtype=wide)
        if average:
            made["average"] = make.normal(num, grad=False, dtype=wide)
        return made | options

    return Sample(name=name, inputs=inputs, dtypes=dtypes)


def cost(inputs: Inputs) -> tuple[Cost, Cost]:
    """Gradients are read twice, once for the norm; the rest is read and written once."""
    read = 2 * inputs["grad"].numel() * inputs["grad"].element_size()
    for name in _STATES:
        if name in inputs and name != "grad":
            passes = 1 if name == "param" and "master" in inputs else 2
            read += passes * inputs[name].numel() * inputs[name].element_size()
    return Cost(bytes=read), Cost(bytes=0)


def transformer(width: int, layers: int, vocabulary: int) -> list[int]:
    """Numbers of values of a decoder's parameters: a few are large, most are vectors."""
    layer = [width, 3 * width * width, 3 * width, width * width, width]
    layer += [width, 4 * width * width, 4 * width, 4 * width * width, width]
    return [vocabulary * width, *layer * layers, width]


_HALF = (torch.bfloat16, torch.float16)
_LARGE = transformer(2048, 16, 50304)
_SMALL = transformer(256, 8, 8192)

SAMPLES = OpSamples(
    name="adamw",
    function=step,
    small=(
        _sample("five tensors", (5, 0, 1030, 33, 1)),
        _sample("masters", (4, 1025), master=True, dtypes=(*_HALF, torch.float32)),
        _sample("two pieces", (8500, 7), average=False),
        _sample("equal average", (6, 3, 9), swa=True),
        _sample("maximize", (6, 3), maximize=True, average=False),
        _sample("infinite", (6, 3), scale=float("inf"), skip_nonfinite=True),
        _sample("not a number", (6, 3), scale=float("nan"), skip_nonfinite=True),
        _sample("finite", (6, 3), scale=0.5, skip_nonfinite=True, step=1000.0),
        _sample("empty", (0,)),
    ),
    real=(
        _sample("1B", _LARGE, master=True, in_place=True, step=10.0),
        _sample("1B float32", _LARGE, dtypes=(torch.float32,), in_place=True, step=10.0),
    ),
    laptop=(_sample("8M", _SMALL, dtypes=(torch.float32,), in_place=True, step=10.0),),
    cost=cost,
    eager=_torch(fused=False),
    peers=(Peer(name="torch fused", function=_torch(fused=True)),),
)
