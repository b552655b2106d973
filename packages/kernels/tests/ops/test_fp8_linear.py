"""``fp8_linear`` on every backend, bit for bit as torchao emulates it."""

import pytest
import torch
from torch import Tensor, nn

from fivefold.kernels.errors import BackendError, KernelInputError
from fivefold.kernels.ops.fp8_linear import fp8_linear
from fivefold.kernels.ops.fp8_linear.samples import SAMPLES
from fivefold.kernels.testing import op_tests

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Results = tuple[Tensor, ...]


class WithoutAten:
    """The kit's view of an op: what torch brings for it runs on a GPU alone."""

    backends = ("triton", "reference")


TestLaws = op_tests(SAMPLES, ops=(WithoutAten,))


def ours(x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor, **options: object) -> Results:
    leaves = [each.detach().requires_grad_() for each in (x, weight, bias) if each is not None]
    y = fp8_linear(*leaves, backend="reference", **options)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def torchao(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dy: Tensor,
    *,
    grad_dtype: torch.dtype = E5M2,
    power_of_2_scale: bool = False,
) -> Results:
    float8 = pytest.importorskip("torchao.float8.float8_linear")
    config = pytest.importorskip("torchao.float8.config")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight.detach())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach())
    recipe = config.Float8LinearConfig(
        cast_config_grad_output=config.CastConfig(target_dtype=grad_dtype),
        round_scales_to_power_of_2=power_of_2_scale,
        emulate=True,
    )
    layer = float8.Float8Linear.from_float(layer, recipe)
    x = x.detach().requires_grad_()
    y = layer(x)
    return y.detach(), *torch.autograd.grad(y, (x, *layer.parameters()), dy)


def assert_same(found: Results, expected: Results) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


SHAPES = [((7,), 5, 3), ((64,), 128, 96), ((3, 11), 33, 17), ((1,), 1, 1), ((2, 3, 5), 24, 40)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("leading", "inner", "width"), SHAPES, ids=str)
def test_torchao_bit_for_bit(
    leading: tuple[int, ...], inner: int, width: int, dtype: torch.dtype
) -> None:
    x, dy = torch.randn(*leading, inner, dtype=dtype), torch.randn(*leading, width, dtype=dtype)
    weight, bias = torch.randn(width, inner, dtype=dtype), torch.randn(width, dtype=dtype)
    for given in (x, x * 1e-6, x * torch.randn_like(x).exp()):
        inputs = (given, weight, bias, dy * 1e-3)
        assert_same(ours(*inputs), torchao(*inputs))
    inputs = (x, weight, None, dy)
    assert_same(ours(*inputs), torchao(*inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("grad_dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("power_of_2", [False, True], ids=["", "power of two"])
def test_torchao_bit_for_bit_in_every_recipe(
    power_of_2: bool, grad_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    x, weight = torch.randn(19, 37, dtype=dtype), torch.randn(23, 37, dtype=dtype)
    inputs = (x, weight, None, torch.randn(19, 23, dtype=dtype))
    options = {"grad_dtype": grad_dtype, "power_of_2_scale": power_of_2}
    assert_same(ours(*inputs, **options), torchao(*inputs, **options))


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan"), 1e30, 1e-40], ids=str)
def test_torchao_bit_for_bit_at_the_extremes(value: float) -> None:
    x, weight, dy = torch.randn(6, 8), torch.randn(4, 8), torch.randn(6, 4)
    for changed in (x, weight, dy):
        before = changed.clone()
        changed[1, 2] = value
        assert_same(ours(x, weight, None, dy), torchao(x, weight, None, dy))
        changed.fill_(value)
        assert_same(ours(x, weight, None, dy), torchao(x, weight, None, dy))
        changed.copy_(before)


def test_torchao_bit_for_bit_in_other_orders_of_memory() -> None:
    x, weight, dy = torch.randn(37, 19).t(), torch.randn(37, 23).t(), torch.randn(23, 19).t()
    assert_same(ours(x, weight, None, dy), torchao(x, weight, None, dy))
    assert_same(
        ours(x, weight, None, dy[:1].expand(19, 23)),
        torchao(x, weight, None, dy[:1].expand(19, 23)),
    )


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_golden_numbers(backend: str) -> None:
    x = torch.tensor([[1.0, -0.3], [0.07, 2.0]], requires_grad=True)
    weight = torch.tensor([[0.5, 1.0], [-0.2, 0.01]], requires_grad=True)
    y = fp8_linear(x, weight, backend=backend)
    y.backward(torch.tensor([[1.0, 0.3], [-0.01, 0.5]]))
    expected = (
        [[0.2142857015132904, -0.19929847121238708], [2.0357143878936768, 0.006058672443032265]],
        [[0.44387754797935486, 1.0028698444366455], [-0.1026785671710968, -0.003906250465661287]],
        [[0.9993622303009033, -0.3035714328289032], [0.3214285969734192, 0.918367326259613]],
    )
    for found, right in zip((y, x.grad, weight.grad), expected, strict=True):
        torch.testing.assert_close(found, torch.tensor(right), rtol=1e-6, atol=0)


def test_nothing_is_kept_without_gradients() -> None:
    x, weight = torch.randn(3, 16), torch.randn(4, 16)
    for of_x, of_weight in ((False, False), (True, False), (False, True)):
        given = (x.requires_grad_(of_x), weight.requires_grad_(of_weight))
        y = fp8_linear(*given)
        kept = [] if y.grad_fn is None else y.grad_fn.next_functions[0][0].saved_tensors
        sizes = [each.numel() for each in kept if each.dtype == torch.uint8]
        assert sizes == ([x.numel() * of_weight, weight.numel() * of_x] if kept else [])
    with torch.no_grad():
        assert fp8_linear(x, weight).grad_fn is None


def test_it_is_near_the_exact_product() -> None:
    x, weight = torch.randn(64, 256), torch.randn(32, 256)
    exact = x.double() @ weight.double().t()
    error = (fp8_linear(x, weight) - exact).norm() / exact.norm()
    assert 1e-3 < error < 0.05


def test_errors() -> None:
    x, weight = torch.zeros(2, 3), torch.zeros(4, 3)
    with pytest.raises(KernelInputError, match=r"found \(2, 3\) torch.float32 and \(4, 2\)"):
        fp8_linear(x, weight[:, :2])
    with pytest.raises(KernelInputError, match=r"torch\.float32 and \(4, 3\) torch\.bfloat16"):
        fp8_linear(x, weight.bfloat16())
    with pytest.raises(KernelInputError, match=r"found \(2, 3\) torch\.float8_e5m2"):
        fp8_linear(x.to(E5M2), weight.to(E5M2))
    with pytest.raises(KernelInputError, match=r"float8_e5m2, was asked for torch\.float32"):
        fp8_linear(x, weight, grad_dtype=torch.float32)
    with pytest.raises(KernelInputError, match=r"a bias \(4,\), found \(2, 1, 1\)"):
        fp8_linear(x, weight, torch.zeros(2, 1, 1))
    with pytest.raises(BackendError, match="these tensors are on cpu"):
        fp8_linear(x, weight, backend="aten")
    with pytest.raises(BackendError, match=r"too coarse for torch\.float64"):
        fp8_linear(x.double(), weight.double(), backend="triton")
