"""``grouped_mm`` on every backend, and what it shares with torch's own."""

from collections.abc import Callable, Iterator
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from fivefold.kernels.errors import BackendError, KernelInputError
from fivefold.kernels.ops.grouped_mm import aten, grouped_mm, loop, op, reference, triton
from fivefold.kernels.ops.grouped_mm.samples import SAMPLES
from fivefold.kernels.samples import Maker, Sample
from fivefold.kernels.testing import TOLERANCES, assert_close, checks, op_tests

BACKENDS = ("triton", "reference")
# torch's kernel takes these sizes, in strides of 16 bytes.
COUNTS = {
    "even": [4, 4, 4],
    "empty groups": [0, 7, 0, 3, 0],
    "one group": [9],
    "one row": [0, 1],
}
FLOAT8 = [sample for sample in SAMPLES.small if sample.dtypes]
OTHERS = [sample for sample in SAMPLES.small if not sample.dtypes]


class TestLaws(op_tests(SAMPLES, ops=(op.grouped_mm_scaled, op.grouped_mm, op.grouped_outer))):
    @pytest.mark.parametrize("sample", OTHERS, ids=lambda sample: sample.name)
    def test_registration(self, sample: Sample) -> None:
        checks.check_registration(SAMPLES, sample, torch.float64)

    @pytest.mark.parametrize("sample", FLOAT8, ids=lambda sample: sample.name)
    def test_registration_of_float8(self, sample: Sample) -> None:
        """All but opcheck's look for changed inputs, which multiplies them: float8 cannot."""
        given = sample.inputs(Maker(dtype=torch.bfloat16))
        arguments = [given[name] for name in ("mat_a", "mat_b", "offs", "scale_a", "scale_b")]
        tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        opcheck(op.grouped_mm_scaled.overload, (*arguments, torch.bfloat16, None), test_utils=tests)


def operands(
    counts: list[int], inner: int = 16, outer: int = 8, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(sum(counts), inner, dtype=dtype, requires_grad=True)
    weight = torch.randn(len(counts), outer, inner, dtype=dtype, requires_grad=True)
    return x, weight, torch.tensor(counts).cumsum(0).to(torch.int32)


def gathered(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """Every row times the weight of its group, gathered: another algorithm than the loop."""
    group = torch.arange(len(offs)).repeat_interleave(offs.diff(prepend=offs.new_zeros(1)))
    return torch.einsum("tk,tnk->tn", x, weight[group])


@pytest.fixture
def by_torch() -> Iterator[None]:
    """A CPU whose products are not oneDNN's."""
    with patch.object(loop, "faster", lambda x: False):
        yield


@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_torch_kernel(counts: list[int], dtype: torch.dtype) -> None:
    """Chosen where it runs; its numbers are those of torch and those that the reference has."""
    x, weight, offs = operands(counts, dtype=dtype)
    inputs = (x, weight.mT, offs, dtype)
    assert op.grouped_mm.choose(inputs) == "aten"
    found = grouped_mm(x, weight.mT, offs=offs)
    assert torch.equal(found, F.grouped_mm(x, weight.mT, offs=offs))
    assert torch.equal(found, reference.grouped_mm(*inputs))
    dy = torch.randn_like(found)
    gradients = torch.autograd.grad(found, (x, weight), dy)
    assert torch.equal(gradients[1], reference.grouped_outer(dy.mT, x, offs, dtype))
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = torch.autograd.grad(gathered(*wide, offs), wide, dy.double())
    for name, gradient, right in zip(("x", "weight"), gradients, expected, strict=True):
        assert gradient.dtype == dtype
        assert_close(name, gradient, right, dtype)


@pytest.fixture
def by_loop() -> Iterator[None]:
    """A CPU whose products are oneDNN's."""
    with patch.object(loop, "faster", lambda x: x.dtype in (torch.float32, torch.bfloat16)):
        yield


@pytest.mark.usefixtures("by_loop")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("inner", "outer"), [(16, 8), (15, 7), (1, 1)], ids=str)
@pytest.mark.parametrize("counts", [[9, 0, 17, 40, 3, 8], [0, 7, 0], [33], [300, 5, 530]], ids=str)
def test_loop(counts: list[int], inner: int, outer: int, dtype: torch.dtype) -> None:
    """In any sizes; what follows a group changes none of its numbers, and gets zeros at the end."""
    x, weight, offs = operands(counts, inner, outer, dtype)
    rest = torch.full((30, inner), torch.nan, dtype=dtype)
    for longer in (torch.cat([x.detach(), rest]), x.detach().clone()):
        longer.requires_grad_()
        dy = torch.randn(len(longer), outer).to(dtype)
        y = grouped_mm(longer, weight.mT, offs=offs, backend="aten")
        dx, dweight = torch.autograd.grad(y, (longer, weight), dy)
        a, b = (each.detach().double().requires_grad_() for each in (x, weight))
        expected = gathered(a, b, offs)
        right = torch.autograd.grad(expected, (a, b), dy[: len(x)].double())
        assert not y[len(x) :].any() and not dx[len(x) :].any()
        assert_close("y", y[: len(x)], expected, dtype)
        assert_close("x", dx[: len(x)], right[0], dtype)
        assert_close("weight", dweight, right[1], dtype)


def test_groups_have_few_sizes() -> None:
    rows = [loop.few_sizes(count) for count in range(loop.MOST_ROWS + 1)]
    assert set(rows[8:]) == {16, 32, 48, 64, 96, 128, 160, 192, 224, 256}
    sums = [loop.few_sums(count) for count in range(4096)]
    assert all(size - count < max(16, count / 7) for count, size in enumerate(sums))
    assert len(set(sums[128:1024])) <= 25 and len(set(sums)) < 60
    for sizes in (rows, sums):
        assert all(count <= size for count, size in enumerate(sizes))
        assert sizes[:8] == [*range(8)]


@pytest.mark.usefixtures("by_loop")
def test_products_have_few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the routing, also of the last group."""
    sizes = set()

    def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        sizes.add(len(a))
        return torch.mm(a, b, out=out)

    monkeypatch.setattr(loop, "_product", product)
    for counts in ([301, 270, 267], [280, 290, 601], [555, 300, 31]):
        x, weight, offs = operands(counts, 16, 8)
        found = loop.grouped_mm(x.detach(), weight.detach().mT, offs)
        assert_close("y", found, gathered(x.detach(), weight.detach(), offs), x.dtype)
    assert sizes == {16, 32, 48, 96, 256}


@pytest.mark.usefixtures("by_loop")
def test_loop_takes_any_strides() -> None:
    x, weight, offs = operands([2, 1], 15, 7)
    assert aten.refuses("grouped_mm", x, weight.mT, offs, torch.float32) is None
    x, weight, offs = operands([2, 1], 0, 8)
    assert aten.refuses("grouped_mm", x, weight.mT, offs, torch.float32) is not None


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_matrices_is_laid_out_as_they_are(transposed: bool, backend: str) -> None:
    x, weight, offs = operands([2, 0, 3])
    matrices = weight.detach().mT if transposed else weight.detach().mT.contiguous()
    matrices.requires_grad_()
    y = grouped_mm(x.detach(), matrices, offs=offs, backend=backend)
    (found,) = torch.autograd.grad(y, matrices, torch.ones_like(y))
    assert found.stride() == matrices.stride()


def test_torch_kernel_runs_the_backward_too() -> None:
    def fail(*_: object) -> None:
        raise AssertionError("the loop was used")

    x, weight, offs = operands([3, 5])
    with (
        patch.object(op.grouped_mm, "implementation", wraps=op.grouped_mm.implementation) as rows,
        patch.object(
            op.grouped_outer, "implementation", wraps=op.grouped_outer.implementation
        ) as c,
    ):
        grouped_mm(x, weight.mT, offs=offs).square().sum().backward()
    assert {call.args for call in (*rows.call_args_list, *c.call_args_list)} == {("aten",)}


def test_torch_kernel_leaves_no_garbage_after_the_last_group() -> None:
    x, weight, offs = operands([3, 5])
    longer = torch.cat([x.detach(), torch.full((4, 16), torch.nan)]).requires_grad_()
    y = grouped_mm(longer, weight.mT, offs=offs, backend="aten")
    y.sum().backward()
    assert torch.equal(y[:8], grouped_mm(x, weight.mT, offs=offs)) and not y[8:].any()
    assert longer.grad is not None and not longer.grad[8:].any()
    assert weight.grad is not None and weight.grad.isfinite().all()


@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize(
    ("inner", "outer", "dtype"),
    [(15, 8, torch.float32), (16, 7, torch.bfloat16), (16, 8, torch.float64)],
    ids=str,
)
def test_what_torch_kernel_refuses(inner: int, outer: int, dtype: torch.dtype) -> None:
    x, weight, offs = operands([3, 0, 5], inner, outer, dtype)
    with pytest.raises(BackendError, match=r"strides of 16 bytes|has no torch\.float64"):
        grouped_mm(x, weight.mT, offs=offs, backend="aten").sum().backward()
    assert_close(
        "x", grouped_mm(x, weight.mT, offs=offs), gathered(x, weight, offs).double(), dtype
    )


def test_memory_that_torch_kernel_refuses_is_copied() -> None:
    x, weight, offs = operands([3, 5])
    shifted = torch.zeros(8 * 16 + 1)[1:].view(8, 16).copy_(x.detach())
    for rows in (shifted, x.detach()[:1].expand(8, 16), x.detach().repeat(1, 2)[:, ::2]):
        found = grouped_mm(rows, weight.mT, offs=offs, backend="aten")
        torch.testing.assert_close(found, gathered(rows, weight, offs))


@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0]], ids=str)
def test_gradients_of_gradients(counts: list[int]) -> None:
    x, weight, offs = operands(counts, 3, 2, torch.float64)
    y = torch.randn(len(x), 2, dtype=torch.float64, requires_grad=True)
    for function, inputs in (
        (lambda a, b: grouped_mm(a, b.mT, offs=offs), (x, weight)),
        (lambda a, b: grouped_mm(a.mT, b, offs=offs), (x, y)),
    ):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_matrices_always_get_a_gradient(backend: str) -> None:
    x, weight, offs = operands([0, 0])
    grouped_mm(x.detach(), weight.mT, offs=offs, backend=backend).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "make",
    [
        lambda x, w: (x.T.contiguous().T, w),
        lambda x, w: (x, w.mT.contiguous().mT),
        lambda x, w: (torch.stack((x, x), 1)[:, 0], torch.stack((w, w), 1)[:, 1]),
        lambda x, w: (x[:1].expand(x.shape), w[:1].expand(w.shape)),
    ],
    ids=["x columns", "weight columns", "strided", "expanded"],
)
def test_operands_in_any_strides(
    make: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], backend: str
) -> None:
    x, weight, offs = operands([3, 0, 6])
    a, b = make(x.detach(), weight.detach())
    found = grouped_mm(a, b.mT, offs=offs[::1], backend=backend)
    torch.testing.assert_close(found, gathered(a, b, offs))
    every_other = torch.stack((offs, offs), 1)[:, 0]
    assert torch.equal(grouped_mm(a, b.mT, offs=every_other, backend=backend), found)


def test_expanded_gradients() -> None:
    x, weight, offs = operands([3, 2])
    grouped_mm(x, weight.mT, offs=offs).sum().backward()
    a, b = x.detach().requires_grad_(), weight.detach().requires_grad_()
    gathered(a, b, offs).sum().backward()
    torch.testing.assert_close(x.grad, a.grad)
    torch.testing.assert_close(weight.grad, b.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_wider_results(backend: str) -> None:
    """The sum is rounded once, to the dtype that was asked for."""
    x, weight, offs = operands([3, 4], dtype=torch.bfloat16)
    y = grouped_mm(x, weight.mT, offs=offs, out_dtype=torch.float32, backend=backend)
    assert y.dtype == torch.float32
    assert_close("y", y, gathered(x.double(), weight.double(), offs), torch.float32)
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16


def test_rows_of_no_group_in_blocks() -> None:
    for first in (0, 3, 16, 20):
        y = torch.ones(20, 19)
        triton.zero_after(y, torch.tensor([1, first], dtype=torch.int32))
        assert y[:first].all() and not y[first:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_float8_divides_by_its_scales(backend: str) -> None:
    x, weight = torch.randn(6, 32), torch.randn(2, 8, 32)
    offs = torch.tensor([2, 6], dtype=torch.int32)
    x_fp8, weight_fp8 = (x * 9).to(torch.float8_e5m2), (weight * 7).to(torch.float8_e4m3fn)
    scales = {"scale_a": torch.tensor(9.0), "scale_b": torch.tensor([7.0, 7.0])}
    y = grouped_mm(x_fp8, weight_fp8.mT, offs=offs, backend=backend, **scales)
    assert y.dtype == torch.bfloat16 and not y.requires_grad
    expected = gathered(x_fp8.double() / 9, weight_fp8.double() / 7, offs)
    assert_close("y", y, expected, torch.bfloat16)
    assert (y - gathered(x, weight, offs)).norm() < 0.1 * y.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_float8_scales_whose_product_is_out_of_range(backend: str) -> None:
    x = torch.full((1, 16), 448.0).to(torch.float8_e4m3fn)
    scale, offs = torch.tensor([1e-30]), torch.tensor([1], dtype=torch.int32)
    y = grouped_mm(
        x,
        x[None].mT,
        offs=offs,
        out_dtype=torch.float32,
        scale_a=scale,
        scale_b=1 / scale,
        backend=backend,
    )
    torch.testing.assert_close(y, torch.full((1, 1), 448.0**2 * 16))


@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("ends", [[4, 3], [2, 9], [-1, 8]], ids=str)
def test_offsets_that_do_not_fit(ends: list[int], backend: str) -> None:
    x, weight, _ = operands([4, 4])
    offs = torch.tensor(ends, dtype=torch.int32)
    with pytest.raises(KernelInputError, match=r"up to the 8 of the ragged dim; found \["):
        grouped_mm(x, weight.mT, offs=offs, backend=backend)
    with pytest.raises(KernelInputError, match="ragged dim"):
        grouped_mm(x.mT, x, offs=offs, backend=backend)


@pytest.mark.parametrize(
    ("a", "b", "num_groups"),
    [
        ((4, 3), (2, 4, 5), 2),
        ((4, 3), (2, 3, 5), 3),
        ((2, 4, 3), (2, 3, 5), 2),
        ((4, 3), (0, 3, 5), 0),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit(a: tuple[int, ...], b: tuple[int, ...], num_groups: int) -> None:
    offs = torch.ones(num_groups, dtype=torch.int32)
    with pytest.raises(KernelInputError) as error:
        grouped_mm(torch.zeros(a), torch.zeros(b), offs=offs)
    assert f"found {a} x {b} with offs ({num_groups},)" in str(error.value)


def test_dtypes_that_do_not_fit() -> None:
    x, matrix = torch.zeros(2, 16), torch.zeros(1, 16, 8)
    offs = torch.tensor([2], dtype=torch.int32)
    float8, one = torch.float8_e4m3fn, torch.tensor(1.0)
    with pytest.raises(KernelInputError, match=r"offs \(1,\) in torch\.int64"):
        grouped_mm(x, matrix, offs=offs.long())
    with pytest.raises(KernelInputError, match=r"torch\.float32 and torch\.bfloat16"):
        grouped_mm(x, matrix.bfloat16(), offs=offs)
    with pytest.raises(KernelInputError, match=r"torch\.int32 and torch\.int32"):
        grouped_mm(x.int(), matrix.int(), offs=offs)
    with pytest.raises(KernelInputError, match=r"was asked for torch\.int8"):
        grouped_mm(x, matrix, offs=offs, out_dtype=torch.int8)
    with pytest.raises(KernelInputError, match="found none and none with torch"):
        grouped_mm(x.to(float8), matrix.to(float8), offs=offs)
    with pytest.raises(KernelInputError, match=r"found a scale of shape \(\) and none"):
        grouped_mm(x, matrix, offs=offs, scale_a=one)
    with pytest.raises(KernelInputError, match=r"with scale_a \(\) and scale_b \(3,\)"):
        grouped_mm(x.to(float8), matrix.to(float8), offs=offs, scale_a=one, scale_b=torch.ones(3))


def test_tolerances_are_tight_enough_to_see_a_missing_row() -> None:
    x, weight, offs = operands([3, 5], dtype=torch.bfloat16)
    wrong = gathered(x, weight, offs)
    wrong[-1] = 0
    with pytest.raises(AssertionError, match="values are off"):
        assert_close("y", grouped_mm(x, weight.mT, offs=offs), wrong.double(), torch.bfloat16)
    assert max(TOLERANCES.values()) < 0.1


@pytest.mark.parametrize("frozen", ["mat_a", "mat_b"])
def test_keeps_nothing_that_only_a_frozen_operand_needs(frozen: str) -> None:
    operands = {"mat_a": torch.randn(4, 8), "mat_b": torch.randn(2, 8, 3)}
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    for name, operand in operands.items():
        operand.requires_grad_(name != frozen)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        grouped_mm(**operands, offs=torch.tensor([1, 4], dtype=torch.int32)).sum().backward()
    # The gradient of one operand is made of the other.
    assert operands[frozen].data_ptr() in kept
    trained = next(each for name, each in operands.items() if name != frozen)
    assert trained.data_ptr() not in kept
