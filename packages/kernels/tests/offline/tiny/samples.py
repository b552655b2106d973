"""One call for each way to start a kernel."""

import torch

from fivefold.kernels.samples import Cost, Inputs, Maker, OpSamples, Sample
from tiny import tiny

_DTYPES = dict.fromkeys(("barrier", "exact_matrices", "spilling"), torch.float32)


def _sample(start: str) -> Sample:
    def inputs(make: Maker) -> Inputs:
        to = torch.float8_e4m3fn if start == "float8" else None
        return {
            "start": start,
            "x": make.normal(1024 * 4096, grad=False),
            "y": make.normal(1024 * 4096 + 1, grad=False, dtype=to),
        }

    return Sample(name=start, inputs=inputs, dtypes=(_DTYPES.get(start, torch.bfloat16),))


SAMPLES = OpSamples(
    name="tiny",
    function=tiny,
    eager=tiny,
    small=(),
    real=tuple(
        _sample(start)
        for start in (
            "good",
            "strided",
            "offset",
            "spilling",
            "matrices",
            "exact_matrices",
            "float8",
            "wrong",
            "nested",
            "unfit",
            "unfinished",
            "barrier",
        )
    ),
    laptop=(),
    cost=lambda _: (Cost(bytes=0), Cost(bytes=0)),
    tensor_cores=True,
)
