"""``linear`` on every backend."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fivefold.kernels import Linear
from fivefold.kernels.errors import BackendError, KernelInputError
from fivefold.kernels.ops.linear import linear, op
from fivefold.kernels.ops.linear.samples import SAMPLES
from fivefold.kernels.testing import op_tests

TestLaws = op_tests(SAMPLES, ops=(op.linear_forward,))


@pytest.fixture(params=[True, False], ids=["MKL is slow", "MKL is fast"])
def slow(request, monkeypatch):
    monkeypatch.setattr(op, "mkl_is_slow", lambda: request.param)
    monkeypatch.setattr(op, "FEWEST_PRODUCTS", 9 * 5 * 6)
    return request.param


@pytest.fixture
def chosen(monkeypatch):
    """Products that oneDNN made."""
    found = []
    made = op.linear_forward.implementation("aten")
    monkeypatch.setattr(
        op.linear_forward,
        "implementation",
        lambda backend: lambda *inputs: found.append(backend) or made(*inputs),
    )
    return found


def operands(*shape, width=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    sizes = (shape, (width, shape[-1]), (width,))
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in sizes]


@pytest.mark.parametrize("shape", [(9, 5), (2, 4, 5), (3, 5), (5,), (0, 5), (2, 0, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_is_torchs(slow, shape, dtype):
    inputs = operands(*shape, dtype=dtype)
    found, expected = linear(*inputs), F.linear(*inputs)
    torch.testing.assert_close(found, expected)
    dy = torch.randn(expected.shape).to(dtype)
    gradients = (torch.autograd.grad(y, inputs, dy) for y in (found, expected))
    torch.testing.assert_close(*gradients)


def test_gradients_have_gradients(slow):
    inputs = operands(9, 5)

    def second(y):
        (dx,) = torch.autograd.grad(y.square().sum(), inputs[0], create_graph=True)
        return torch.autograd.grad(dx.square().sum(), inputs)

    torch.testing.assert_close(second(linear(*inputs)), second(F.linear(*inputs)))


def test_onednn_runs_float32_of_many_rows_where_mkl_is_slow(slow, chosen):
    linear(*operands(9, 5)).sum().backward()
    assert chosen == ["aten"] * 3 * slow, "forward and two gradients"


@pytest.mark.parametrize(
    "inputs",
    [
        operands(op.FEWEST_ROWS - 1, 64),
        operands(8, 5),
        operands(9, 5, dtype=torch.float64),
        operands(9, 5, dtype=torch.bfloat16),
        [x.to("meta") for x in operands(9, 5)],
    ],
    ids=["few rows", "small", "float64", "bfloat16", "meta"],
)
def test_all_else_is_torchs_own_way(monkeypatch, chosen, inputs):
    monkeypatch.setattr(op, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(op, "FEWEST_PRODUCTS", 9 * 5 * 6)
    linear(*inputs)
    assert chosen == []


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_few_rows_without_gradients_are_read_in_cpp(monkeypatch, rows, dtype):
    monkeypatch.setattr(op, "FEWEST_WEIGHTS", 6 * 80)
    monkeypatch.setattr(op, "mkl_is_slow", lambda: True)
    found = []
    made = op.linear_forward.implementation
    monkeypatch.setattr(
        op.linear_forward, "implementation", lambda backend: found.append(backend) or made(backend)
    )
    inputs = operands(1, rows, 80, dtype=dtype)
    with torch.no_grad():
        y, expected = linear(*inputs), F.linear(*inputs)
    torch.testing.assert_close(y, expected)
    most = {torch.float32: 7, torch.bfloat16: 3}.get(dtype, 0)
    assert found == ["cpu"] * (rows <= most)
    linear(*inputs)
    linear(inputs[0].detach(), inputs[1].detach().t().contiguous().t())
    assert "cpu" not in found[1:], "gradients, and weights in columns"


def test_weights_with_gaps_between_their_rows():
    x, weight, bias = operands(3, 70, width=100)
    part = weight.detach()[::2, :37]
    found = linear(x[:, :37].detach(), part, bias[::2].detach(), backend="cpu")
    torch.testing.assert_close(found, F.linear(x[:, :37], part, bias[::2]).detach())


@pytest.mark.parametrize("frozen", [0, 1], ids=["input", "weight"])
def test_what_only_a_frozen_operand_needs_is_not_kept(slow, frozen):
    inputs = operands(9, 5)
    inputs[frozen].requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = linear(*inputs)
    assert [t.data_ptr() for t in kept] == [inputs[frozen].data_ptr()]
    y.sum().backward()
    assert inputs[frozen].grad is None
    assert inputs[1 - frozen].grad is not None


def test_follows_autocast(slow):
    inputs = operands(9, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = linear(*inputs), F.linear(*inputs)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


def test_the_layer_is_torchs(slow):
    ours, theirs = Linear(5, 6), nn.Linear(5, 6)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 4, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    assert repr(ours) == repr(theirs)


def test_refuses_by_name():
    with pytest.raises(
        BackendError, match=r"for float32 on the CPU, this is torch\.float64 on cpu"
    ):
        linear(*operands(9, 5, dtype=torch.float64), backend="aten")
    x, weight, bias = operands(9, 5)
    with pytest.raises(KernelInputError, match=r"found \(9, 5\) torch.float32 and \(9, 6\)"):
        linear(x, x.new_ones(9, 6), backend="reference")
    with pytest.raises(KernelInputError, match=r"a bias \(6,\) in torch.float32, found \(3,\)"):
        linear(x, weight, bias[:3], backend="reference")
    with pytest.raises(KernelInputError, match="of one floating-point dtype"):
        linear(x.int(), weight.int(), backend="reference")
