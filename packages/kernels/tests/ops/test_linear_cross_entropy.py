"""``linear_cross_entropy`` on every backend, in one chunk and in many."""

import math
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fivefold.kernels.errors import KernelInputError
from fivefold.kernels.ops.linear_cross_entropy import chunks, linear_cross_entropy, op
from fivefold.kernels.ops.linear_cross_entropy.samples import SAMPLES
from fivefold.kernels.testing import assert_close, checks, op_tests

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

TestLaws = op_tests(SAMPLES, ops=(op.linear_cross_entropy_sum, op.linear_cross_entropy_tokens))

each_backend = pytest.mark.parametrize("backend", op.BACKENDS)


@each_backend
@pytest.mark.parametrize("sample", [pytest.param(each, id=each.name) for each in SAMPLES.small])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_laws_hold_in_many_chunks(backend: str, sample: Any, dtype: torch.dtype) -> None:
    # Two tokens a chunk at 37 classes in float64, and parts of some rows.
    with patch.dict(chunks._BUDGET, cpu=1200), patch.object(chunks, "_PART", 300):
        checks.check_values(SAMPLES, sample, backend, dtype)


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_a_linear_layer_and_torchs_loss(backend: str, reduction: str) -> None:
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    layer = torch.nn.Linear(6, 9, dtype=torch.float64)
    target = torch.tensor([[1, 8, -100, 0], [2, 2, -100, 7]])
    weight = torch.rand(9, dtype=torch.float64)
    sources = [x, *layer.parameters()]
    options: Any = {"weight": weight, "reduction": reduction, "label_smoothing": 0.2}
    found = linear_cross_entropy(
        x, layer.weight, target, linear_bias=layer.bias, **options, backend=backend
    )
    expected = F.cross_entropy(layer(x).flatten(0, 1), target.flatten(), **options)
    assert_close("loss", found, expected.reshape(found.shape), torch.float64)
    pairs = zip(
        torch.autograd.grad((found * 3).sum(), sources),
        torch.autograd.grad((expected * 3).sum(), sources),
        strict=True,
    )
    for one, other in pairs:
        assert_close("gradient", one, other, torch.float64)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch 2.13 brings it")
def test_takes_what_torchs_function_takes() -> None:
    x, weight, bias = torch.randn(5, 4), torch.randn(7, 4), torch.randn(7)
    target = torch.tensor([0, 6, 2, -100, 1])
    options: Any = {"linear_bias": bias, "weight": torch.rand(7), "label_smoothing": 0.1}
    found = linear_cross_entropy(x, weight, target, **options)
    torch.testing.assert_close(found, F.linear_cross_entropy(x, weight, target, **options))


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_may_be_asked_for_twice(backend: str, reduction: str) -> None:
    x, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    loss = linear_cross_entropy(
        x, weight, torch.tensor([0, 6, 2, 3, 1]), reduction=reduction, backend=backend
    ).sum()
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    again = torch.autograd.grad(2 * loss, (x, weight))
    for one, other in zip(first, again, strict=True):
        torch.testing.assert_close(2 * one, other)


@each_backend
def test_follows_autocast(backend: str) -> None:
    x, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    target = torch.tensor([0, 6, 2, 3, 1])
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(x, weight, target, backend=backend)
    low = linear_cross_entropy(x.bfloat16(), weight.bfloat16(), target, backend=backend)
    assert torch.equal(found, low) and found.dtype == torch.float32
    gradients = torch.autograd.grad(found, (x, weight))
    assert [each.dtype for each in gradients] == [torch.float32] * 2


def test_mixed_dtypes_are_welcome_under_autocast_alone() -> None:
    arguments = torch.randn(5, 4).bfloat16(), torch.randn(7, 4), torch.tensor([0, 6, 2, 3, 1])
    with torch.autocast("cpu", torch.bfloat16):
        linear_cross_entropy(*arguments)
    with pytest.raises(KernelInputError, match=r"dtype, found torch.bfloat16, torch.float32"):
        linear_cross_entropy(*arguments)


def test_loss_and_weight_gradient_of_many_bfloat16_chunks_lose_nothing() -> None:
    # Summed in bfloat16, 512 equal contributions would stop growing at 256.
    x, weight = torch.ones(512, 1).bfloat16(), torch.zeros(2, 1).bfloat16().requires_grad_()
    with patch.dict(chunks._BUDGET, cpu=8):
        loss = linear_cross_entropy(x, weight, torch.zeros(512).long(), reduction="sum")
    assert torch.autograd.grad(loss, weight)[0].tolist() == [[-256.0], [256.0]]
    torch.testing.assert_close(loss, torch.tensor(512 * math.log(2)))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_target_out_of_range_is_an_error_on_a_cpu(backend: str, reduction: str) -> None:
    arguments = torch.randn(5, 4), torch.randn(7, 4), torch.tensor([0, 6, 2, 7, 1])
    with (
        patch.dict(chunks._BUDGET, cpu=8),
        pytest.raises(KernelInputError, match="target 3 is 7; legal are 0 to 6"),
    ):
        linear_cross_entropy(*arguments, reduction=reduction, backend=backend)


X, W, Y = torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X, W[0], Y), {}, r"linear_weight \(V, D\) of at least one class, found \(3,\)"),
        ((X, W[:0], Y), {}, r"at least one class, found \(0, 3\)"),
        ((X[:, :2], W, Y), {}, r"input \(..., 3\) for a linear_weight of shape \(5, 3\), found"),
        ((X, W, Y[:1]), {}, r"target of shape \(2,\) for an input of shape \(2, 3\), found \(1,\)"),
        ((X, W, Y), {"linear_bias": X[0]}, r"linear_bias of shape \(5,\), found \(3,\)"),
        ((X, W, Y), {"reduction": "max"}, "linear_cross_entropy was asked for the reduction 'max'"),
        ((Y[:, None], W[:, :1].long(), Y), {}, "floating-point dtype, found torch.int64"),
    ],
)
def test_errors(arguments: tuple[Tensor, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelInputError, match=message):
        linear_cross_entropy(*arguments, **options)


@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 4096, 4097])
@pytest.mark.parametrize("row_bytes", [2 * 32000, 4 * 131072, 1 << 30])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_chunks_keep_the_budget_and_are_alike(num_tokens: int, row_bytes: int, device: str) -> None:
    size = chunks.chunk_size(num_tokens, row_bytes, device)
    budget = chunks._BUDGET.get(device, chunks._BUDGET_ON_DEVICES)
    assert size == 1 or size * 2 * row_bytes <= budget
    fewest = -(-num_tokens // max(1, budget // (2 * row_bytes)))
    assert -(-num_tokens // size) <= fewest
