"""What counts as equal to the specification."""

import pytest
import torch

from fivefold.kernels.testing import TOLERANCES, assert_close

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("dtype", [d for d, t in TOLERANCES.items() if t], ids=str)
def test_one_rounding_passes_and_a_wrong_digit_does_not(dtype: torch.dtype) -> None:
    exact = torch.randn(100, dtype=torch.float64)
    assert_close("x", exact.to(dtype), exact, dtype)
    with pytest.raises(AssertionError, match=r"x in torch.* 1 of 100 values .* first at \(7,\)"):
        wrong = exact.clone()
        wrong[7] += 3 * TOLERANCES[dtype] * (wrong[7].abs() + exact.square().mean().sqrt())
        assert_close("x", wrong, exact, dtype)


@pytest.mark.parametrize(
    ("found", "expected"),
    [([INF, 1.0], [1.0, 1.0]), ([NAN, 1.0], [1.0, 1.0]), ([1.0, 1.0], [INF, 1.0])],
)
def test_infinities_and_nan_must_be_where_they_belong(found: list, expected: list) -> None:
    with pytest.raises(AssertionError, match="1 of 2 values are off"):
        assert_close("x", torch.tensor(found), torch.tensor(expected), torch.float32)


def test_infinities_and_nan_may_be_expected() -> None:
    both = torch.tensor([INF, -INF, NAN, 2.0])
    assert_close("x", both, both.double(), torch.float32)
    with pytest.raises(AssertionError):
        assert_close("x", -both, both.double(), torch.float32)


def test_shapes_must_agree() -> None:
    with pytest.raises(AssertionError, match=r"shape \(2,\) instead of \(1, 2\)"):
        assert_close("x", torch.ones(2), torch.ones(1, 2), torch.float32)
