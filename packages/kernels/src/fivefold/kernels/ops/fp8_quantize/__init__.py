"""Quantisation to float8 with one scale for a whole tensor, computed from its present values."""

import torch
from torch import Tensor

from fivefold.kernels.ops.fp8_quantize import op

__all__ = ["fp8_quantize"]


def fp8_quantize(
    x: Tensor,
    dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    power_of_2_scale: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale the largest magnitude to the largest finite float8, and round: per-tensor scaling.

    ``scale = max(dtype) / max(amax(|x|), 1e-12)``, in float64 and rounded to float32, and
    ``x_fp8 = round(clamp(float32(x) * scale))``, to nearest even: x is about ``x_fp8 / scale``.
    Small values flush to zero. An infinity makes the scale 0 and its own place NaN; a NaN makes
    everything NaN. It is the current (dynamic) scaling of Nemotron-H, arXiv 2504.03624 section
    2.3, bit for bit as torchao computes it.

    Args:
        x: any shape, floating point. It gets no gradient: ``fp8_linear`` is what one trains with.
        dtype: ``torch.float8_e4m3fn`` (up to 448) or ``torch.float8_e5m2`` (up to 57344).
        power_of_2_scale: round the scale down to a power of two.
        backend: the default is the best there is.

    Returns:
        x in ``dtype``, and the scale, float32 of shape ().

    Raises:
        KernelInputError: x is no floating-point tensor, or dtype is none of the two.

    >>> import torch
    >>> fp8_quantize(torch.tensor([0.0, 1.0, -2.0]))
    (tensor([   0.,  224., -448.], dtype=torch.float8_e4m3fn), tensor(224.))
    """
    return op.apply(x, dtype, power_of_2_scale, backend)
