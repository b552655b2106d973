"""Products of float8 values in plain torch, in place of a package's kernels.

Legend: K features summed over, N of the result, T rows of all experts, E experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fivefold.parallel_core.fp8.products import Products
from fivefold.parallel_core.fp8.scaling import E4M3, largest, rounded, scale_of


def fake(x: Tensor, dtype: torch.dtype = E4M3, power_of_2: bool = False) -> Tensor:
    """What is left of a tensor after it was float8, in its own dtype."""
    scale = scale_of(largest([x], None)[0], dtype, power_of_2)
    return rounded(x, scale, dtype).to(x.dtype) / scale.to(x.dtype)


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    grad_dtype: torch.dtype,
    power_of_2_scale: bool,
) -> Tensor:
    """Forward of an FP8 layer; the gradient's dtype plays no part in it."""
    x, w = (fake(each, power_of_2=power_of_2_scale) for each in (input, weight))
    return F.linear(x, w, bias)


def grouped_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    *,
    offs: Tensor,
    out_dtype: torch.dtype | None = None,
    scale_a: Tensor | None = None,
    scale_b: Tensor | None = None,
) -> Tensor:
    """One product after another, in float64."""
    a, b = mat_a.double(), mat_b.double()
    a = a if scale_a is None else a / scale_a.double()
    b = b if scale_b is None else b / scale_b.double()
    spans = list(zip([0, *offs.tolist()[:-1]], offs.tolist(), strict=True))
    if b.dim() == 2:
        out = torch.stack([a[:, start:end] @ b[start:end] for start, end in spans])
    else:
        out = torch.cat([a[start:end] @ each for (start, end), each in zip(spans, b, strict=True)])
    return out.to(out_dtype or mat_a.dtype)


PLAIN = Products(linear=linear, grouped_mm=grouped_mm)
