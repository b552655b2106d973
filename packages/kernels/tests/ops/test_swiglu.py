"""``swiglu`` on every backend."""

import pytest
import torch
import torch.nn.functional as F

from fivefold.kernels.errors import KernelInputError
from fivefold.kernels.ops.swiglu import op, swiglu
from fivefold.kernels.ops.swiglu.samples import SAMPLES
from fivefold.kernels.testing import assert_close, op_tests

TestLaws = op_tests(SAMPLES, ops=(op.swiglu_forward, op.swiglu_backward))

BACKENDS = op.BACKENDS


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_what_torch_computes(backend):
    gate, up = (torch.randn(3, 67, requires_grad=True) for _ in range(2))
    dy = torch.randn(3, 67)
    found, expected = swiglu(gate, up, backend=backend), F.silu(gate) * up
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(y, (gate, up), dy) for y in (found, expected))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_magnitude_of_the_gate(backend, dtype):
    exact = torch.cat((-torch.logspace(-30, 4, 400), torch.logspace(-30, 4, 400)))
    gate = exact.to(dtype).requires_grad_()
    y = swiglu(gate, torch.ones_like(gate), backend=backend)
    y.sum().backward()
    wide = gate.detach().double().requires_grad_()
    expected = F.silu(wide)
    expected.sum().backward()
    # Relative to each value, up to what is lost below the smallest normal number.
    for found, wanted in ((y, expected), (gate.grad, wide.grad)):
        error = (found.double() - wanted).abs()
        allowed = 16 * torch.finfo(dtype).eps * wanted.abs() + torch.finfo(dtype).tiny * 128
        assert (error <= allowed).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinities_and_nan_are_where_torch_has_them(backend):
    inf, nan = float("inf"), float("nan")
    gate = torch.tensor([inf, -inf, nan, 200.0, -200.0, 1.0, 1.0, 0.0])
    up = torch.tensor([2.0, 2.0, 1.0, 3.0, 1.0, nan, inf, inf])
    torch.testing.assert_close(swiglu(gate, up, backend=backend), F.silu(gate) * up, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_halves_and_packed_are_the_same(backend):
    packed = torch.randn(2, 3, 10, requires_grad=True)
    gate, up = packed.chunk(2, dim=-1)
    halves, whole = swiglu(gate, up, backend=backend), swiglu(packed, backend=backend)
    assert torch.equal(halves, whole)
    dy = torch.randn_like(whole)
    (of_whole,) = torch.autograd.grad(whole, packed, dy)
    (of_halves,) = torch.autograd.grad(halves, packed, dy)
    assert of_whole.is_contiguous()
    assert torch.equal(of_whole, of_halves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_weights_of_bfloat16_rows(backend):
    packed = torch.randn(7, 12).bfloat16().requires_grad_()
    weight = torch.rand(7, requires_grad=True)
    y = swiglu(packed, row_scale=weight, backend=backend)
    dy = torch.randn(7, 6).bfloat16()
    dpacked, dweight = torch.autograd.grad(y, (packed, weight), dy)
    assert y.dtype == dpacked.dtype == torch.bfloat16
    wide = packed.detach().double().requires_grad_()
    wide_weight = weight.detach().double().requires_grad_()
    gate, up = wide.chunk(2, dim=-1)
    expected = F.silu(gate) * up * wide_weight[:, None]
    dwide, dwide_weight = torch.autograd.grad(expected, (wide, wide_weight), dy.double())
    assert_close("result", y, expected, torch.bfloat16)
    assert_close("gradient of packed", dpacked, dwide, torch.bfloat16)
    # Never rounded to bfloat16 on the way.
    assert_close("gradient of row_scale", dweight, dwide_weight, torch.float32)


def test_threads_share_the_work():
    packed, weight = torch.randn(33, 2048, requires_grad=True), torch.rand(33, requires_grad=True)
    torch.set_num_threads(2)
    found, expected = (
        swiglu(packed, row_scale=weight, backend=backend) for backend in ("cpu", "reference")
    )
    torch.testing.assert_close(found, expected)
    dy = torch.randn(33, 1024)
    gradients = (torch.autograd.grad(y, (packed, weight), dy) for y in (found, expected))
    torch.testing.assert_close(*gradients)


def test_keeps_only_its_inputs():
    packed, weight = torch.randn(4, 6, requires_grad=True), torch.rand(4, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        swiglu(packed, row_scale=weight)
    assert [t.data_ptr() for t in kept] == [packed.data_ptr(), weight.data_ptr()]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.ones(2, 3),), "odd size 3"),
        ((torch.tensor(1.0),), r"of shape \(\)"),
        ((torch.ones(2, 4, dtype=torch.int32),), r"found torch\.int32"),
        ((torch.ones(2, 4), torch.ones(2, 3)), r"found torch.float32 of shape \(2, 3\) on cpu"),
        ((torch.ones(2, 4), torch.ones(2, 4).half()), "an up like gate.*found torch.float16"),
        ((torch.ones(2, 4), torch.ones(2, 4, device="meta")), "on meta"),
    ],
)
def test_refuses_what_does_not_fit(inputs, message):
    with pytest.raises(KernelInputError, match=message):
        swiglu(*inputs)


@pytest.mark.parametrize(
    "row_scale",
    [torch.ones(2, 1), torch.ones(2, dtype=torch.int64), torch.ones(2, device="meta")],
)
def test_refuses_a_row_scale_that_does_not_fit(row_scale):
    with pytest.raises(KernelInputError, match=r"row_scale of shape \(2,\)"):
        swiglu(torch.ones(2, 4), row_scale=row_scale)
