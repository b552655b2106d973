"""What the given kernels are asked for."""

import torch

from fivefold.parallel_core.fp8.products import wide_enough
from fivefold.parallel_core.fp8.scaling import E4M3

from .plain import PLAIN


def float8(*shape: int) -> torch.Tensor:
    return (torch.randn(*shape) * 9).to(E4M3)


def test_products_are_those_of_the_values_divided_by_scales() -> None:
    torch.manual_seed(0)
    two, three = torch.tensor(2.0), torch.tensor(3.0)
    a, b = float8(5, 8), float8(4, 8)
    expected = (a.double() / 2) @ (b.double() / 3).T
    torch.testing.assert_close(
        PLAIN.matrix(a, two, b, three, torch.float64), expected, rtol=1e-14, atol=1e-14
    )
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    weight = float8(3, 8, 4)
    rows = PLAIN.rows(a, two, weight, three, ends, torch.float64)
    wide = weight.double() / 3
    assert torch.allclose(rows[:2], a[:2].double() / 2 @ wide[0], rtol=1e-14)
    assert torch.allclose(rows[2:], a[2:].double() / 2 @ wide[2], rtol=1e-14)
    other = float8(5, 4)
    outer = PLAIN.outer(a, two, other, three, ends, torch.float64)
    assert torch.allclose(outer[2], (a[2:].double() / 2).T @ other[2:].double() / 3, rtol=1e-14)
    assert torch.equal(outer[1], torch.zeros(8, 4, dtype=torch.float64))


def test_sums_are_in_float32_or_wider() -> None:
    kinds = [torch.bfloat16, torch.float32, torch.float64]
    assert [wide_enough(kind) for kind in kinds] == [torch.float32, torch.float32, torch.float64]
