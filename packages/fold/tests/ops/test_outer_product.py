"""``outer_product`` on every backend, in any number of rows, and what it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fivefold.fold.errors import FoldInputError
from fivefold.fold.ops.outer_product import op, outer_product
from fivefold.fold.ops.outer_product.samples import SAMPLES, eager
from fivefold.kernels.testing import op_tests

TestLaws = op_tests(SAMPLES, ops=(op.outer_product_forward, op.outer_product_backward))


def _operands() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"a": (2, 6, 7, 3), "b": (2, 6, 5, 4), "weight": (8, 12), "bias": (8,)}
    return {
        name: torch.randn(shape, dtype=torch.float64).requires_grad_()
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("num_rows", [None, 1, 3, 7, 20])
def test_rows_at_a_time_change_nothing(num_rows: int | None) -> None:
    inputs = _operands()
    found = outer_product(**inputs, num_rows=num_rows)
    expected = eager(**inputs)
    weights = torch.randn_like(expected)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), list(inputs.values())),
        torch.autograd.grad((expected * weights).sum(), list(inputs.values())),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": torch.zeros(3, 4)}, r"a \(..., S, I, C\) and b .* found a \(3, 4\)"),
        ({"a": torch.zeros(5, 7, 3)}, r"found a \(5, 7, 3\), b \(6, 5, 4\)"),
        ({"weight": torch.zeros(8, 11)}, r"weight \(Z, C \* D\), found .*weight \(8, 11\)"),
        ({"bias": torch.zeros(7)}, r"bias \(8,\), found \(7,\)"),
        ({"a": torch.zeros(6, 7, 3).double()}, "one floating-point dtype, found torch.float32, "),
        ({"num_rows": 0}, "at least 1 row at a time, found 0"),
    ],
)
def test_says_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    shapes = {"a": (6, 7, 3), "b": (6, 5, 4), "weight": (8, 12), "bias": (8,)}
    operands = {name: torch.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(FoldInputError, match=message):
        outer_product(**(operands | changes))
