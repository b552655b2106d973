"""The one table of tolerances: how far from the float64 specification a result may be."""

import torch
from torch import Tensor

# Relative to a value plus the root mean square of all values. Each allows some roundings of the
# dtype: 2^-53, 2^-24, 2^-11 and 2^-8. From fine to coarse.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 2e-2,
    torch.float8_e4m3fn: 0.0,  # nothing to allow for: a quantised value is one or another
    torch.float8_e5m2: 0.0,
}


def assert_close(name: str, found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Fail unless ``found`` is the float64 tensor ``expected`` up to the rounding of ``dtype``.

    Infinities and NaN must be where they are expected.
    """
    if found.shape != expected.shape:
        raise AssertionError(
            f"{name}: shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
        )
    found = found.detach().to(torch.float64).cpu()
    expected = expected.detach().to(torch.float64).cpu()
    finite = expected.isfinite()
    same = (found == expected) | (found.isnan() & expected.isnan())
    if not (finite | same).all():
        raise AssertionError(f"{name}: {_where(~(finite | same), found, expected)}")
    if not finite.any():
        return
    scale = expected[finite].square().mean().sqrt()
    allowed = TOLERANCES[dtype] * (expected.abs() + scale)
    wrong = finite & ~((found - expected).abs() <= allowed)
    if wrong.any():
        raise AssertionError(f"{name} in {dtype}: {_where(wrong, found, expected)}")


def _where(wrong: Tensor, found: Tensor, expected: Tensor) -> str:
    index = tuple(int(i) for i in wrong.nonzero()[0])
    return (
        f"{int(wrong.sum())} of {wrong.numel()} values are off, the first at {index}: "
        f"{float(found[index])} instead of {float(expected[index])}"
    )
