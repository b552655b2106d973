"""Derivatives beyond a backward pass: right, or an error, and never zero without a word."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

from fivefold.kernels import (
    KernelInputError,
    attention,
    cross_entropy,
    fp8_linear,
    grouped_mm,
    layer_norm,
    linear_cross_entropy,
    relu2,
    rms_norm,
    rotary,
    swiglu,
)

TARGET = torch.arange(4)
ONCE: dict[str, Callable[[Tensor], Tensor]] = {
    "rms_norm": lambda x: rms_norm(x, (64,)),
    "layer_norm": lambda x: layer_norm(x, (64,)),
    "swiglu": swiglu,
    "relu2": relu2,
    "cross_entropy": lambda x: cross_entropy(x, TARGET),
    "linear_cross_entropy": lambda x: linear_cross_entropy(x, x.detach(), TARGET),
    "losses": lambda x: linear_cross_entropy(x, x.detach(), TARGET, reduction="none"),
    "attention": lambda x: attention(x[None], x[None], x[None]),
    "fp8_linear": lambda x: fp8_linear(x, x.detach()),
}
TABLE = torch.linspace(0, 1, 128, dtype=torch.float64).reshape(4, 32)
REPEATEDLY: dict[str, Callable[[Tensor], Tensor]] = {
    "grouped_mm": lambda x: grouped_mm(x, x.mT[None], offs=torch.tensor([4], dtype=torch.int32)),
    "rotary": lambda x: rotary(x[:, None], TABLE.cos(), TABLE.sin()).square(),
}
ALL = ONCE | REPEATEDLY
each_op = pytest.mark.parametrize("name", ALL)


def _x() -> Tensor:
    return torch.randn(4, 64, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("backend", ["", "reference"])
@pytest.mark.parametrize("name", ONCE)
def test_a_gradient_of_a_gradient_that_is_not_there_is_an_error(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIVEFOLD_BACKEND", backend)
    x = _x()
    # The gradient of the sum too, into which nothing comes that depends on x.
    for loss in (ONCE[name](x).sum(), ONCE[name](x).square().sum()):
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        penalised = loss.detach() + slope.square().sum()
        with pytest.raises(KernelInputError, match="has a gradient, and its gradient has none"):
            penalised.backward()


@pytest.mark.parametrize("name", ONCE)
def test_so_it_is_where_only_one_input_is_asked_for(name: str) -> None:
    # Autograd walks no further than to what it was asked for: there must be a way through the op.
    x = _x()
    (slope,) = torch.autograd.grad(ONCE[name](x).sum(), x, create_graph=True)
    with pytest.raises(KernelInputError, match="has a gradient, and its gradient has none"):
        torch.autograd.grad(x.sum() + slope.square().sum(), x)


@pytest.mark.parametrize("name", ONCE)
def test_so_it_is_for_torch_func(name: str) -> None:
    def penalised(x: Tensor) -> Tensor:
        return x.sum() + grad(lambda x: ONCE[name](x).sum())(x).square().sum()

    with pytest.raises(KernelInputError, match="has a gradient, and its gradient has none"):
        grad(penalised)(_x().detach())


@each_op
@pytest.mark.parametrize("create_graph", [False, True])
def test_what_is_saved_is_unpacked_once(name: str, create_graph: bool) -> None:
    x = _x()
    loss = checkpoint(ALL[name], x, use_reentrant=False).square().sum()
    (found,) = torch.autograd.grad(loss, x, create_graph=create_graph)
    (expected,) = torch.autograd.grad(ALL[name](x).square().sum(), x)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ONCE)
def test_a_gradient_with_a_graph_is_the_same(name: str) -> None:
    x = _x()
    loss = ONCE[name](x).square().sum()
    (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
    (found,) = torch.autograd.grad(loss, x, create_graph=True)
    assert torch.equal(found.detach(), expected)


@pytest.mark.parametrize("name", REPEATEDLY)
def test_what_is_made_of_ops_with_gradients_has_them_to_any_order(name: str) -> None:
    assert torch.autograd.gradgradcheck(REPEATEDLY[name], (_x(),))


# torch compiles formulas of its own for tangents, in a way that it calls outdated itself.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is:DeprecationWarning")
@each_op
def test_a_tangent_is_an_error(name: str) -> None:
    x = _x().detach()
    with pytest.raises(KernelInputError, match="no forward-mode derivative"):
        jvp(ALL[name], (x,), (x,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        with pytest.raises(KernelInputError, match="no forward-mode derivative"):
            ALL[name](dual)


@each_op
def test_gradients_by_torch_func(name: str) -> None:
    x = _x()
    (expected,) = torch.autograd.grad(ALL[name](x).square().sum(), x)
    found = grad(lambda x: ALL[name](x).square().sum())(x.detach())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@each_op
def test_gradients_of_each_sample_of_a_batch(name: str) -> None:
    def loss(x: Tensor) -> Tensor:
        return ALL[name](x).square().sum()

    batch = torch.randn(3, 4, 64, dtype=torch.float64)
    found = vmap(grad(loss))(batch)
    for x, gradient in zip(batch, found, strict=True):
        torch.testing.assert_close(gradient, grad(loss)(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        grad(lambda batch: vmap(loss)(batch).sum())(batch), found, rtol=1e-10, atol=1e-10
    )
