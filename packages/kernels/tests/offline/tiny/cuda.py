"""The kernel of CUDA C++."""

from pathlib import Path

import torch
from torch import Tensor

from fivefold.kernels import cuda_route

PROGRAM = cuda_route.load(Path(__file__).parents[2] / "cuda_route" / "barrier.cu")


def barrier(x: Tensor, y: Tensor) -> None:
    counters = torch.empty(2, dtype=torch.float32, device=x.device)
    cuda_route.launch(
        PROGRAM,
        "normalize",
        (132,),
        (256,),
        x,
        y,
        counters,
        counters[1:],
        x.numel() // 4,
        1e-6,
        shared_bytes=1000,
        cooperative=True,
    )
