"""``layer_norm`` on every backend."""

import pytest
import torch
import torch.nn.functional as F

from fivefold.kernels.errors import KernelInputError
from fivefold.kernels.ops.layer_norm import layer_norm, op
from fivefold.kernels.ops.layer_norm.rows import as_rows
from fivefold.kernels.ops.layer_norm.samples import SAMPLES
from fivefold.kernels.testing import assert_close, memory, op_tests

TestLaws = op_tests(SAMPLES, ops=(op.layer_norm_forward, op.layer_norm_backward))

BACKENDS = op.BACKENDS


@pytest.mark.parametrize("backend", BACKENDS)
def test_pair_tensor_transposed_is_read_where_it_lies(backend: str) -> None:
    pair = torch.randn(1, 5, 7, 12, dtype=torch.float64)
    weight, bias = torch.randn(2, 12, dtype=torch.float64)
    view = pair.transpose(1, 2)
    assert as_rows(view, 1).data_ptr() == pair.data_ptr()
    view.requires_grad_()
    found = layer_norm(view, (12,), weight, bias, backend=backend)
    expected = F.layer_norm(view, (12,), weight, bias)
    torch.testing.assert_close(found, expected)
    dy = torch.randn(1, 5, 7, 12, dtype=torch.float64).transpose(1, 2)
    for ours, torchs in zip(
        torch.autograd.grad(found, view, dy), torch.autograd.grad(expected, view, dy), strict=True
    ):
        torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize(
    ("make", "copied"),
    [
        (lambda x: x, False),
        (lambda x: x[:, 1:], False),
        (lambda x: x[:, :, ::2], False),
        (lambda x: x.transpose(0, 1), True),
        (lambda x: x[..., :4], False),
        (lambda x: x[:1].transpose(1, 2), False),
        (lambda x: x.expand(3, 2, 3, 4, 6)[:, 0], False),
        (lambda x: x.permute(2, 1, 0, 3), True),
        (lambda x: x[:, :, :, ::2], True),
        (lambda x: x.transpose(2, 3), True),
    ],
)
def test_rows_are_the_rows(make, copied: bool) -> None:
    x = make(torch.randn(2, 3, 4, 6))
    rows = as_rows(x, 1)
    assert torch.equal(rows.reshape(x.shape), x)
    assert rows.dim() == 3 and rows.stride(2) == 1
    assert (rows.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()) == copied


def test_two_normalised_dims_with_a_gap_are_copied() -> None:
    x = torch.randn(2, 3, 4, 6)[:, :, :3]
    y = torch.randn(2, 3, 4, 6)[..., :5]
    assert as_rows(x, 2).shape == (1, 6, 18)
    assert torch.equal(as_rows(x, 2).reshape(x.shape), x)
    assert torch.equal(as_rows(y, 2).reshape(y.shape), y)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_torch(backend: str, dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(*s, dtype=dtype) for s in ((4, 9, 65), (65,), (65,)))
    for parameters in ((None, None), (weight, bias), (weight, None)):
        found = layer_norm(x, (65,), *parameters, eps=0.01, backend=backend)
        expected = F.layer_norm(x.double(), (65,), *_double(parameters), eps=0.01)
        assert_close("layer_norm", found, expected, dtype)


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_parameters_may_be_finer_than_the_rows(backend: str) -> None:
    x = torch.randn(6, 24).bfloat16().requires_grad_()
    weight, bias = torch.randn(2, 24).requires_grad_()
    y = layer_norm(x, (24,), weight, bias, backend=backend)
    dx, dweight = torch.autograd.grad(y.float().sum(), (x, weight))
    assert (y.dtype, dx.dtype, dweight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    expected = F.layer_norm(x.double(), (24,), weight.double(), bias.double())
    assert_close("layer_norm", y, expected, torch.bfloat16)
    exact = F.layer_norm(x.double(), (24,)).sum(0)
    assert_close("dweight", dweight, exact, torch.float32)


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_half_precision(backend: str) -> None:
    x = torch.randn(6, 40).half()
    y = layer_norm(x, (40,), backend=backend)
    assert_close("layer_norm", y, F.layer_norm(x.double(), (40,)), torch.float16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_values(backend: str) -> None:
    rows = torch.tensor([[7.0] * 20, [0.0] * 20, [1e15] * 10 + [-1e15] * 10])
    rows = torch.cat([rows, torch.full((2, 20), float("nan")), torch.randn(1, 20)])
    rows[4] = torch.tensor([float("inf")] + [0.0] * 19)
    found = layer_norm(rows, (20,), backend=backend)
    assert torch.equal(found[:2], torch.zeros(2, 20))
    torch.testing.assert_close(found[2].abs(), torch.ones(20))
    assert found[3:5].isnan().all()
    torch.testing.assert_close(found[5], F.layer_norm(rows[5], (20,)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_mean_0_and_variance_1_whatever_the_scale(backend: str) -> None:
    x = torch.randn(5, 48, dtype=torch.float64)
    y = layer_norm(100 * x + 3, (48,), eps=0, backend=backend)
    torch.testing.assert_close(y.mean(-1), torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(y.square().mean(-1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(y, layer_norm(x, (48,), eps=0, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_follow_are_left_alone(backend: str) -> None:
    # Not NaN, which would pass for the poison where it is written.
    x = torch.randn(9, 24, dtype=torch.float64)[:5].requires_grad_()
    weight = torch.randn(24, dtype=torch.float64)
    dy = torch.randn(9, 24, dtype=torch.float64)[:5]
    with memory.poisoned():
        y = layer_norm(x, (24,), weight, backend=backend)
        torch.autograd.grad(y, x, dy)


@pytest.mark.parametrize("rows", [1, 4, 6])
def test_wide_rows(rows: int) -> None:
    x = torch.randn(rows, 2500, dtype=torch.float64, requires_grad=True)
    parameters = torch.randn(2, 2500, dtype=torch.float64).unbind()
    leaves = [x, *(each.requires_grad_() for each in parameters)]
    found = layer_norm(x, (2500,), *parameters, backend="cpu")
    expected = F.layer_norm(x, (2500,), *parameters)
    torch.testing.assert_close(found, expected)
    dy = torch.randn(rows, 2500, dtype=torch.float64)
    for ours, torchs in zip(
        torch.autograd.grad(found, leaves, dy),
        torch.autograd.grad(expected, leaves, dy),
        strict=True,
    ):
        torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_the_rows(threads: int) -> None:
    x, dy = torch.randn(2, 700, 96, dtype=torch.float64)
    parameters = torch.randn(2, 96, dtype=torch.float64)

    def run() -> tuple[torch.Tensor, ...]:
        leaves = [each.clone().requires_grad_() for each in (x, *parameters)]
        y = layer_norm(leaves[0], (96,), *leaves[1:], backend="cpu")
        return (y, *torch.autograd.grad(y, leaves, dy))

    alone = run()
    torch.set_num_threads(threads)
    together, again = run(), run()
    for one, many, repeated in zip(alone, together, again, strict=True):
        torch.testing.assert_close(many, one)
        assert torch.equal(many, repeated)


def test_errors_say_what_fits() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(KernelInputError, match=r"last dims \(5,\), found input of shape \(3, 4\)"):
        layer_norm(x, (5,))
    with pytest.raises(KernelInputError, match=r"last dims \(\)"):
        layer_norm(x, ())
    with pytest.raises(KernelInputError, match=r"a weight of shape \(4,\), found \(3,\)"):
        layer_norm(x, (4,), torch.ones(3))
    with pytest.raises(KernelInputError, match=r"a bias of shape \(4,\), found \(1, 4\)"):
        layer_norm(x, (4,), torch.ones(4), torch.ones(1, 4))
    with pytest.raises(KernelInputError, match=r"found torch\.int64"):
        layer_norm(x.long(), (4,))


def _double(parameters: tuple[torch.Tensor | None, ...]) -> list[torch.Tensor | None]:
    return [None if each is None else each.double() for each in parameters]
