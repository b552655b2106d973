"""Calls of ``grouped_mm``: odd ones for tests, those of models for machine code and benchmarks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fivefold.kernels.ops.grouped_mm import grouped_mm
from fivefold.kernels.samples import Cost, Inputs, Maker, OpSamples, Peer, Sample

E4M3 = torch.float8_e4m3fn


def _ends(make: Maker, counts: tuple[int, ...]) -> Tensor:
    # Behind a number that belongs to nobody.
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return make.values([99, *ends], torch.int32)[1:]


def _rows(
    counts: tuple[int, ...], inner: int, outer: int, *, left: int = 0, transposed: bool = True
) -> Sample:
    """Rows of each group, their width, the results' width, and rows of no group."""

    def inputs(make: Maker) -> Inputs:
        shape = (len(counts), outer, inner) if transposed else (len(counts), inner, outer)
        weight = make.normal(*shape, scale=max(inner, 1) ** -0.5)
        return {
            "mat_a": make.normal(sum(counts) + left, inner),
            "mat_b": weight.mT if transposed else weight,
            "offs": _ends(make, counts),
        }

    return Sample(name=_named(counts, inner, outer), inputs=inputs)


def _outer(counts: tuple[int, ...], height: int, width: int, *, left: int = 0) -> Sample:
    def inputs(make: Maker) -> Inputs:
        return {
            "mat_a": make.normal(sum(counts) + left, height).mT,
            "mat_b": make.normal(sum(counts) + left, width),
            "offs": _ends(make, counts),
            "out_dtype": torch.float32 if make.dtype == torch.bfloat16 else None,
        }

    return Sample(name=f"ragged inner {_named(counts, height, width)}", inputs=inputs)


def _columns(counts: tuple[int, ...], inner: int, outer: int) -> Sample:
    def inputs(make: Maker) -> Inputs:
        return {
            "mat_a": make.normal(len(counts), outer, inner),
            "mat_b": make.normal(inner, sum(counts)),
            "offs": _ends(make, counts),
        }

    return Sample(name=f"columns {_named(counts, inner, outer)}", inputs=inputs)


def _float8(counts: tuple[int, ...], inner: int, outer: int, *, single: bool = False) -> Sample:
    def inputs(make: Maker) -> Inputs:
        rows, groups = (1, 1) if single else (sum(counts) + 3, len(counts))
        weight = make.normal(len(counts), outer, inner, scale=9, grad=False, dtype=E4M3)
        return {
            "mat_a": make.normal(sum(counts) + 3, inner, scale=9, grad=False, dtype=E4M3),
            "mat_b": weight.mT,
            "offs": _ends(make, counts),
            "scale_a": make.normal(rows, grad=False, dtype=torch.float32),
            "scale_b": make.normal(groups, grad=False, dtype=torch.float32),
        }

    return Sample(
        name=f"float8 {_named(counts, inner, outer)}", inputs=inputs, dtypes=(torch.bfloat16,)
    )


def _named(counts: tuple[int, ...], inner: int, outer: int) -> str:
    alike = len(counts) > 2 and len(set(counts)) == 1
    of = f"{len(counts)} groups of {counts[0]}" if alike else str(counts)
    return f"{of} {inner} to {outer}"


def cost(inputs: Inputs) -> tuple[Cost, Cost]:
    """Two operations for each row, input and output; backward has two such products."""
    a, b, groups = inputs["mat_a"], inputs["mat_b"], inputs["offs"].numel()
    outputs = b.shape[-1] * (groups if b.dim() == 2 and a.dim() == 2 else 1) * a.shape[-2]
    flops = 2 * a.shape[-2] * a.shape[-1] * b.shape[-1]
    size = torch.bfloat16.itemsize if a.element_size() == 1 else a.element_size()
    forward = Cost(
        bytes=a.numel() * a.element_size() + b.numel() * b.element_size() + outputs * size,
        flops=flops,
    )
    return forward, Cost(bytes=2 * forward.bytes, flops=2 * flops)


def _eager(mat_a: Tensor, mat_b: Tensor, offs: Tensor, **options: Any) -> Tensor:
    """What a user of torch alone writes; float8 by torch's own kernel, for rows of scales."""
    if options.get("scale_a") is None:
        return F.grouped_mm(mat_a, mat_b, offs=offs)
    num_groups, _, width = mat_b.shape
    scale_a = options["scale_a"].reciprocal().expand(mat_a.shape[0]).contiguous()
    scale_b = options["scale_b"].reciprocal()[:, None].expand(num_groups, width).contiguous()
    return torch._scaled_grouped_mm(
        mat_a, mat_b, scale_a, scale_b, offs, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _loop(mat_a: Tensor, mat_b: Tensor, offs: Tensor, **_: Any) -> Tensor:
    parts = mat_a.split(offs.diff(prepend=offs.new_zeros(1)).tolist())
    return torch.cat([part @ matrix for part, matrix in zip(parts, mat_b, strict=True)])


def _is_rows(inputs: Inputs) -> bool:
    return inputs["mat_b"].dim() == 3 and inputs.get("scale_a") is None


SAMPLES = OpSamples(
    name="grouped_mm",
    function=grouped_mm,
    small=(
        _rows((5, 0, 35, 1), 24, 20, left=19),
        _outer((5, 0, 20), 35, 17, left=4),
        _float8((2, 0, 37), 24, 21),
        _columns((3, 9), 7, 5),
        _float8((4,), 16, 8, single=True),
        _rows((0, 0), 8, 16, left=3),
        _rows((2, 1), 0, 3, transposed=False),
        _outer((0, 0), 8, 3),
    ),
    real=(
        _rows((2048,) * 8, 4096, 14336),
        _rows((512,) * 128, 2048, 768),
        _float8((2048,) * 8, 4096, 14336),
    ),
    laptop=(_rows((64,) * 8, 512, 256),),
    cost=cost,
    eager=_eager,
    peers=(Peer(name="a loop over groups", function=_loop, takes=_is_rows),),
    tensor_cores=True,
)
