"""``grouped_mm`` by torch: CUTLASS on a GPU, on the CPU a loop.

Legend: T the ragged dim, E groups, K and M and N the others.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fivefold.kernels.backends import missing
from fivefold.kernels.ops.grouped_mm import loop
from fivefold.kernels.ops.grouped_mm.check import spans

_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.bfloat16,),
}


def refuses(name: str, *inputs: Any) -> str | None:
    """Dtypes and strides that torch's kernels do not take, and where they are wrong."""
    mat_a, mat_b, offs, out_dtype = inputs
    device = mat_a.device.type
    if mat_a.dtype not in _DTYPES.get(device, ()) or out_dtype != mat_a.dtype:
        return f"torch's kernel on {device} has no {mat_a.dtype} to {out_dtype}"
    if 0 in (*mat_a.shape, *mat_b.shape, *offs.shape):
        return "torch's kernel takes no empty operands"
    if not loop.faster(mat_a) and not (_can_be_aligned(mat_a) and _can_be_aligned(mat_b)):
        return (
            "torch's kernel wants strides of 16 bytes, these are "
            f"{mat_a.stride()} and {mat_b.stride()} values of {mat_a.dtype}"
        )
    if device == "cuda":
        return _refuses_gpu(name, mat_a)
    return None


def grouped_mm(mat_a: Tensor, mat_b: Tensor, offs: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``(T, N)``: the rows of group e times ``mat_b[e]``, then zeros."""
    if loop.faster(mat_a):
        return loop.grouped_mm(mat_a, mat_b, offs)
    y = F.grouped_mm(_aligned(mat_a), _aligned(mat_b), offs=offs)
    # The kernel may pad the rows of its result to strides of 16 bytes.
    return _zero_after(y.contiguous(), offs)


def grouped_outer(mat_a: Tensor, mat_b: Tensor, offs: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``(E, M, N)``: the product over each group's part of T."""
    if loop.faster(mat_a):
        return loop.grouped_outer(mat_a, mat_b, offs)
    if offs.device.type == "cpu":
        spans(offs, mat_b.shape[0])
    return F.grouped_mm(_aligned(mat_a), _aligned(mat_b), offs=offs).contiguous()


def _zero_after(y: Tensor, offs: Tensor) -> Tensor:
    """Zero the rows of no group in place, which torch's kernel leaves as they were allocated."""
    if y.device.type == "cpu":
        y[spans(offs, y.shape[0])[-1][1] :] = 0
    elif missing("triton", y.device.type) is None:
        from fivefold.kernels.ops.grouped_mm.triton import zero_after

        zero_after(y, offs)
    else:
        rows = torch.arange(y.shape[0], device=y.device)
        y.masked_fill_((rows >= offs[-1])[:, None], 0)
    return y


def _refuses_gpu(name: str, x: Tensor) -> str | None:
    capability = torch.cuda.get_device_capability(x.device)
    if capability < (9, 0):
        return f"torch's kernel wants compute capability 9.0, this is {capability}"
    if name == "grouped_outer" and capability >= (10, 0):
        # https://github.com/pytorch/pytorch/issues/172439
        return f"torch's kernel leaves empty groups unwritten on capability {capability}"
    return None


def _aligned(x: Tensor) -> Tensor:
    return x if _is_aligned(x) else x.clone(memory_format=torch.contiguous_format)


def _can_be_aligned(x: Tensor) -> bool:
    return _is_aligned(x) or x.shape[-1] * x.element_size() % 16 == 0


def _is_aligned(x: Tensor) -> bool:
    """Rows or columns of values side by side, every one of them at a multiple of 16 bytes."""
    strides = sorted(x.stride())
    at = (x.data_ptr(), *(stride * x.element_size() for stride in strides[1:]))
    return strides[0] == 1 and all(byte % 16 == 0 for byte in at)
