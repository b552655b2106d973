"""``relu2`` on every backend."""

import pytest
import torch

from fivefold.kernels import errors
from fivefold.kernels.ops.relu2 import op, relu2
from fivefold.kernels.ops.relu2.samples import SAMPLES
from fivefold.kernels.testing import op_tests

TestLaws = op_tests(SAMPLES, ops=(op.relu2_forward, op.relu2_backward))

BACKENDS = op.BACKENDS


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_what_torch_computes(backend, dtype):
    x = torch.randn(3, 67).to(dtype).requires_grad_()
    dy = torch.randn(3, 67).to(dtype)
    found, expected = relu2(x, backend=backend), torch.relu(x).square()
    # One rounding in both; but Triton's interpreter cuts bfloat16 off instead of rounding it.
    digits = 2**-7 if (backend, dtype) == ("triton", torch.bfloat16) else 0
    torch.testing.assert_close(found, expected, rtol=digits, atol=0)
    (dx,), (dx_torch,) = (torch.autograd.grad(y, x, dy) for y in (found, expected))
    torch.testing.assert_close(dx, dx_torch)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_values(backend):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([inf, -inf, nan, 0.0, -0.0, 1e30, -1e30, 1e-30]).requires_grad_()
    y = relu2(x, backend=backend)
    y.sum().backward()
    expected = torch.tensor([inf, 0, nan, 0, 0, inf, 0, 0])
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=0, atol=0)
    slope = torch.tensor([inf, 0, nan, 0, 0, 2e30, 0, 2e-30])
    torch.testing.assert_close(x.grad, slope, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_result_is_contiguous(backend):
    x = torch.randn(4, 6).t().requires_grad_()
    y = relu2(x, backend=backend)
    assert y.is_contiguous()
    torch.testing.assert_close(y, torch.relu(x).square())


def test_keeps_only_its_input():
    x = torch.randn(8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        relu2(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


def test_refuses_integers():
    with pytest.raises(errors.KernelInputError, match=r"floating-point values, found torch\.int64"):
        relu2(torch.arange(3))


def test_threads_share_the_work():
    x, dy = torch.randn(2, 33, 1999)
    x.requires_grad_()
    torch.set_num_threads(2)
    found, expected = relu2(x, backend="cpu"), relu2(x, backend="reference")
    assert torch.equal(found, expected)
    (dx,), (expected,) = (torch.autograd.grad(y, x, dy) for y in (found, expected))
    torch.testing.assert_close(dx, expected)
