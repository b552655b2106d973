"""``fp8_quantize`` in CUDA C++: one cooperative launch, whose second look at x meets the cache.

Legend: R rows, C columns.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fivefold.kernels import cuda_route
from fivefold.kernels.launch import num_sms

_THREADS, _BLOCKS_PER_SM = 512, 2
_INPUTS = {
    torch.float32: "float",
    torch.float16: "__half",
    torch.bfloat16: "__nv_bfloat16",
}
_KINDS = {torch.float8_e4m3fn: "__NV_E4M3", torch.float8_e5m2: "__NV_E5M2"}


def refuses(name: str, *inputs: Any) -> str | None:
    """GPUs that cannot cast to float8, float64, and the transposed copy."""
    x, _, _, transposed = inputs
    if x.dtype not in _INPUTS:
        return f"its kernel takes {', '.join(map(str, _INPUTS))}, not {x.dtype}"
    if transposed:
        return "its kernel writes no transposed copy"
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 9):
        return "float8 needs a GPU of compute capability 8.9 or more"
    return None


def fp8_quantize(
    x: Tensor, dtype: torch.dtype, power_of_2: bool, transposed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Float8 values (R, C), an empty (0,), and the scale ()."""
    x_fp8 = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty((), dtype=torch.float32, device=x.device)
    x = x.contiguous()
    # It reads 16 bytes at once.
    x = x if x.is_meta or x.data_ptr() % 16 == 0 else x.clone()
    # All at once on the GPU, so that they can wait for each other.
    blocks = _BLOCKS_PER_SM * num_sms(x)
    of_block = torch.empty((blocks,), dtype=torch.int32, device=x.device)
    cuda_route.launch(
        _program(x.dtype, dtype),
        "quantize",
        (blocks,),
        (_THREADS,),
        x,
        x_fp8,
        scale,
        of_block,
        x.numel(),
        power_of_2,
        cooperative=True,
    )
    return x_fp8, x_fp8.new_empty(0), scale


@cache
def _program(x_dtype: torch.dtype, dtype: torch.dtype) -> cuda_route.Program:
    defines = {
        "X": _INPUTS[x_dtype],
        "KIND": _KINDS[dtype],
        "LARGEST": str(torch.finfo(dtype).max),
    }
    return cuda_route.load(Path(__file__).with_suffix(".cu"), defines=defines)
