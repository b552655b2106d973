"""What counts as the same result."""

import pytest
import torch

from fivefold.kernels.bench import agreement
from fivefold.kernels.bench.agreement import disagreement


def compare(found, expected, dtype=torch.float32):
    return disagreement({"result 0": found}, {"result 0": expected}, dtype)


def test_rounding_passes_and_an_error_does_not() -> None:
    x = torch.randn(100)
    assert compare(x * 1.001, x) is None
    wrong = x.clone()
    wrong[7] += 0.1
    assert compare(wrong, x).startswith("result 0 differs from ours in 1 of 100 values, by up to")


def test_tolerance_is_of_the_coarsest_dtype() -> None:
    x = torch.randn(100)
    assert compare(x * 1.05, x) is not None
    assert compare((x * 1.05).bfloat16(), x) is None
    assert compare(x * 1.05, x, torch.bfloat16) is None
    assert compare(x.to(torch.float8_e4m3fn), x) is None


def test_not_finite_values_have_to_be_where_ours_are() -> None:
    x = torch.tensor([1.0, torch.inf, torch.nan, -torch.inf])
    assert compare(x.clone(), x) is None
    for value in (torch.nan, -torch.inf, 5.0):
        other = x.clone()
        other[1] = value
        assert compare(other, x) is not None
    wrong = compare(torch.tensor([torch.nan, 1.0]), torch.tensor([1.0, 1.0]))
    assert wrong == "result 0 differs from ours in 1 of 2 values, by up to inf of them"


def test_integers_are_right_or_wrong() -> None:
    x = torch.arange(5)
    assert compare(x.clone(), x, torch.int64) is None
    assert compare(x + torch.tensor([0, 0, 0, 0, 1]), x, torch.int64) is not None


def test_shapes_and_missing_results() -> None:
    x = torch.ones(2, 3)
    assert compare(x.T, x) == "result 0 has shape (3, 2), ours (2, 3)"
    assert disagreement({}, {"gradient of x": x}, torch.float32) == "there is no gradient of x"
    assert disagreement({"a": x, "more": x}, {"a": x}, torch.float32) is None
    assert compare(torch.ones(0, 3), torch.ones(0, 3)) is None


@pytest.mark.parametrize("at", [0, 9])
def test_all_slices_are_looked_at(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    monkeypatch.setattr(agreement, "_SLICE", 4)
    x = torch.ones(10)
    wrong = x.clone()
    wrong[at] = 2
    assert compare(x.clone(), x) is None
    assert "in 1 of 10 values, by up to 0.5 " in compare(wrong, x)
