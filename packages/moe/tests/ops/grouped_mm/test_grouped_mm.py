from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from fivefold.moe.errors import MoEInputError
from fivefold.moe.ops.grouped_mm import autograd, grouped_mm, reference

# float32 and narrower: what torch's kernel and a matmul may differ by, relative and absolute.
TOLERANCE = {
    torch.float64: (0, 0),
    torch.float32: (1e-6, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-2),
    torch.float16: (1e-3, 1e-2),
}
COUNTS = {
    "even": [4, 4, 4],
    "empty experts": [0, 7, 0, 3, 0],
    "one expert": [9],
    "no rows": [0, 0],
    "one row": [0, 1],
}


def operands(
    counts: list[int], inner: int = 16, outer: int = 8, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(sum(counts), inner, dtype=dtype, requires_grad=True)
    weight = torch.randn(len(counts), outer, inner, dtype=dtype, requires_grad=True)
    return x, weight, torch.tensor(counts)


def expected(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Every row times the weight of its group, gathered: another algorithm than the loop."""
    group = torch.arange(len(counts)).repeat_interleave(counts)
    return torch.einsum("tk,tnk->tn", x, weight[group])


def compare(counts: list[int], inner: int, outer: int, dtype: torch.dtype) -> None:
    x, weight, groups = operands(counts, inner, outer, dtype)
    out = grouped_mm(x, weight, groups)
    grad = torch.randn_like(out)
    out.backward(grad)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    right = expected(*wide, groups)
    right.backward(grad.double())
    rtol, atol = TOLERANCE[dtype]
    for found, wanted in ((out, right), (x.grad, wide[0].grad), (weight.grad, wide[1].grad)):
        assert found is not None and wanted is not None
        assert found.dtype == dtype and found.is_contiguous()
        torch.testing.assert_close(
            found, wanted.to(dtype), rtol=max(rtol, 1e-12), atol=max(atol, 1e-12)
        )


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_forward_and_gradients_in_every_dtype(counts: list[int], dtype: torch.dtype) -> None:
    compare(counts, 16, 8, dtype)


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize(("inner", "outer"), [(15, 7), (7, 16), (16, 7), (1, 1), (3, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sizes_that_the_grouped_kernel_refuses(inner: int, outer: int, dtype: torch.dtype) -> None:
    compare([3, 0, 5], inner, outer, dtype)


@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0], [1]])
def test_gradcheck(counts: list[int]) -> None:
    x, weight, groups = operands(counts, 3, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: grouped_mm(a, b, groups), (x, weight))
    assert torch.autograd.gradgradcheck(lambda a, b: grouped_mm(a, b, groups), (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernel_and_specification_give_the_same_numbers(dtype: torch.dtype) -> None:
    x, weight, counts = operands([5, 0, 11], 16, 8, dtype)
    y = torch.randn(16, 8, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(grouped_mm(x, weight, counts), reference.grouped_mm(x, weight, counts))
        found = autograd.grouped_outer(y, x, counts)
        assert torch.equal(found, reference.grouped_outer(y, x, counts))


def test_the_kernel_is_used_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Tensor) -> Tensor:
        raise AssertionError("the loop was used")

    monkeypatch.setattr(reference, "grouped_mm", refuse)
    monkeypatch.setattr(reference, "grouped_outer", refuse)
    x, weight, counts = operands([3, 5])
    grouped_mm(x, weight, counts).square().sum().backward()
    with pytest.raises(AssertionError, match="the loop"):
        grouped_mm(x.double(), weight.double(), counts)


@pytest.mark.parametrize("counts", [[3, 2], [0, 0]])
def test_expanded_gradients(counts: list[int]) -> None:
    x, weight, groups = operands(counts)
    grouped_mm(x, weight, groups).sum().backward()
    a, b = x.detach().requires_grad_(), weight.detach().requires_grad_()
    expected(a, b, groups).sum().backward()
    torch.testing.assert_close(x.grad, a.grad)
    torch.testing.assert_close(weight.grad, b.grad)


def test_weight_has_a_zero_gradient_without_rows() -> None:
    x, weight, counts = operands([0, 0])
    grouped_mm(x.detach(), weight, counts).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize(
    "make",
    [
        lambda x, w: (x.T.contiguous().T, w),
        lambda x, w: (x, w.transpose(1, 2).contiguous().transpose(1, 2)),
        lambda x, w: (torch.stack((x, x), 1)[:, 0], w),
        lambda x, w: (x, torch.stack((w, w), 1)[:, 1]),
        lambda x, w: (x[:1].expand(x.shape), w),
    ],
    ids=["x columns", "weight columns", "x strided", "weight strided", "x expanded"],
)
def test_operands_that_are_not_contiguous(
    make: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> None:
    x, weight, counts = operands([3, 0, 6])
    a, b = make(x.detach(), weight.detach())
    torch.testing.assert_close(grouped_mm(a, b, counts), expected(a, b, counts))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    x, weight, counts = operands([2, 0, 3], dtype=dtype)
    opcheck(torch.ops.fivefold_moe.grouped_mm.default, (x, weight, counts))
    y = torch.randn(5, 8, dtype=dtype, requires_grad=True)
    opcheck(torch.ops.fivefold_moe.grouped_outer.default, (y, x, counts))


def test_compiles_without_a_graph_break() -> None:
    x, weight, counts = operands([2, 0, 3])
    compiled = torch.compile(grouped_mm, fullgraph=True, backend="aot_eager")
    out = compiled(x, weight, counts)
    out.square().sum().backward()
    torch.testing.assert_close(out, expected(x, weight, counts))
    assert weight.grad is not None and weight.grad[2].abs().sum() > 0


@pytest.mark.parametrize(
    ("x", "weight", "counts", "message"),
    [
        ((4, 3), (2, 5, 4), [2, 2], r"x \(4, 3\) .* weight \(2, 5, 4\)"),
        ((4, 3), (2, 5, 3), [2, 1, 1], r"counts \(3,\)"),
        ((4, 3), (2, 5, 3), [2, 1], "4 rows but counts that sum to 3"),
        ((2, 2, 3), (2, 5, 3), [2, 2], r"x \(2, 2, 3\)"),
    ],
)
def test_shapes_that_do_not_fit(
    x: tuple[int, ...], weight: tuple[int, ...], counts: list[int], message: str
) -> None:
    with pytest.raises(MoEInputError, match=message):
        grouped_mm(torch.zeros(x), torch.zeros(weight), torch.tensor(counts))


def test_mixed_dtypes_are_named() -> None:
    with pytest.raises(MoEInputError, match=r"torch\.float32.*torch\.bfloat16"):
        grouped_mm(torch.zeros(1, 8), torch.zeros(1, 8, 8).bfloat16(), torch.tensor([1]))
