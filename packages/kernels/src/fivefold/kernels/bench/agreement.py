"""Whether a contender computes the same: nobody gains by being fast and wrong."""

import torch
from torch import Tensor

from fivefold.kernels.bench.calls import Results

# Relative to a value plus the root mean square of all values. Loose: contenders accumulate and
# round where they like, and tests hold ours to the specification.
_LOOSE = {
    torch.float64: 1e-9,
    torch.float32: 5e-3,
    torch.float16: 3e-2,
    torch.bfloat16: 1e-1,
    torch.float8_e4m3fn: 0.2,
    torch.float8_e5m2: 0.4,
}
# Values compared at once: wide copies of all logits would not fit beside them.
_SLICE = 1 << 24


def disagreement(found: Results, expected: Results, dtype: torch.dtype) -> str | None:
    """What is wrong with a contender's results, None if nothing is.

    Args:
        found: may hold more than is expected.
        expected: results and gradients of ours by name.
        dtype: of the inputs, whose rounding is allowed in results of a finer dtype too.
    """
    for name, value in expected.items():
        if name not in found:
            return f"there is no {name}"
        reason = _difference(found[name], value, dtype)
        if reason is not None:
            return f"{name} {reason}"
    return None


def _difference(found: Tensor, expected: Tensor, dtype: torch.dtype) -> str | None:
    if found.shape != expected.shape:
        return f"has shape {tuple(found.shape)}, ours {tuple(expected.shape)}"
    tolerance = max(_tolerance(each) for each in (found.dtype, expected.dtype, dtype))
    scale = _root_mean_square(expected)
    wrong, worst = 0, 0.0
    for theirs, ours in zip(_slices(found), _slices(expected), strict=True):
        excess = _excess(theirs, ours, scale)
        over = ~(excess <= tolerance)
        wrong += int(over.sum())
        worst = max(worst, float(excess.nan_to_num(nan=torch.inf, posinf=torch.inf).max()))
    if not wrong:
        return None
    return f"differs from ours in {wrong} of {found.numel()} values, by up to {worst:.2g} of them"


def _excess(found: Tensor, expected: Tensor, scale: float) -> Tensor:
    """The difference relative to the value and the scale; infinite or NaN if one is not finite."""
    same = (found == expected) | (found.isnan() & expected.isnan())
    relative = (found - expected).abs() / (expected.abs() + scale)
    return torch.where(same, 0.0, relative)


def _root_mean_square(x: Tensor) -> float:
    total, count = 0.0, 0
    for part in _slices(x):
        finite = part[part.isfinite()]
        total += float(finite.square().sum())
        count += finite.numel()
    return (total / max(count, 1)) ** 0.5


def _slices(x: Tensor) -> list[Tensor]:
    wide = torch.float64 if x.device.type == "cpu" else torch.float32
    return [part.to(wide) for part in x.flatten().split(_SLICE) if part.numel()]


def _tolerance(dtype: torch.dtype) -> float:
    """Zero for integers, which are right or wrong."""
    return _LOOSE.get(dtype, 0.0)
