"""``cross_entropy`` on every backend, and beside torch's own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fivefold.kernels.errors import KernelInputError
from fivefold.kernels.ops.cross_entropy import cross_entropy, op
from fivefold.kernels.ops.cross_entropy.samples import SAMPLES
from fivefold.kernels.testing import assert_close, op_tests

# The interpreter computes with NumPy, which warns of the infinities of tokens that are ignored.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

TestLaws = op_tests(SAMPLES, ops=(op.cross_entropy_forward, op.cross_entropy_backward))

each_backend = pytest.mark.parametrize("backend", op.BACKENDS)


def _with_gradient(
    function: Callable[..., Tensor], x: Tensor, *arguments: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    loss = function(x, *arguments, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


@each_backend
@pytest.mark.parametrize("reduction", op.REDUCTIONS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_torch(backend: str, reduction: str, label_smoothing: float, weighted: bool) -> None:
    x = torch.randn(6, 11, dtype=torch.float64)
    target = torch.tensor([3, 10, -100, 0, 7, -100])
    weight = torch.rand(11, dtype=torch.float64) if weighted else None
    options: Any = {"reduction": reduction, "label_smoothing": label_smoothing}
    found = _with_gradient(cross_entropy, x, target, weight, **options, backend=backend)
    expected = _with_gradient(F.cross_entropy, x, target, weight, **options)
    assert_close("loss", found[0], expected[0], torch.float64)
    assert_close("gradient", found[1], expected[1], torch.float64)


@each_backend
def test_z_loss_is_the_squared_log_of_the_normaliser(backend: str) -> None:
    x, target = torch.randn(5, 9, dtype=torch.float64), torch.tensor([0, 8, -100, 3, 4])
    lse = torch.logsumexp(x, 1)[target != -100]
    plain = cross_entropy(x, target, backend=backend)
    found = cross_entropy(x, target, z_loss=0.5, backend=backend)
    torch.testing.assert_close(found - plain, 0.5 * lse.square().mean())


@each_backend
def test_no_valid_target_is_nan_as_in_torch(backend: str) -> None:
    x, target = torch.randn(3, 4), torch.full((3,), -100)
    loss, gradient = _with_gradient(cross_entropy, x, target, backend=backend)
    assert loss.isnan() and F.cross_entropy(x, target).isnan()
    assert cross_entropy(x, target, reduction="sum", backend=backend) == 0
    assert gradient.shape == x.shape


@each_backend
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shift", [-1e6, 3e4])
def test_logits_far_from_zero(backend: str, label_smoothing: float, shift: float) -> None:
    near = torch.randint(-8, 8, (4, 700)).float()
    target = torch.tensor([1, 699, 350, 0])
    found = _with_gradient(
        cross_entropy, near + shift, target, label_smoothing=label_smoothing, backend=backend
    )
    expected = _with_gradient(
        F.cross_entropy, near.double(), target, label_smoothing=label_smoothing
    )
    # What lse + shift loses to rounding, and nothing that grows with the number of classes.
    assert abs(found[0].double() - expected[0]) <= 2 * abs(shift) * 2**-24
    torch.testing.assert_close(found[1].double(), expected[1], rtol=0.2, atol=1e-7)


@each_backend
def test_what_is_ignored_may_be_nan_and_what_counts_may_not(backend: str) -> None:
    x = torch.randn(3, 40)
    x[0], x[1, 5], x[2] = float("nan"), float("nan"), -float("inf")
    loss, gradient = _with_gradient(
        cross_entropy, x, torch.tensor([-100, 3, 4]), reduction="none", backend=backend
    )
    assert loss[0] == 0 and loss[1:].isnan().all()
    assert (gradient[0] == 0).all() and gradient[1:].isnan().any(1).all()


@each_backend
def test_gradient_of_a_token_sums_to_zero(backend: str) -> None:
    x, target = torch.randn(4, 77, dtype=torch.float64), torch.tensor([0, 5, 76, 33])
    _, gradient = _with_gradient(cross_entropy, x, target, label_smoothing=0.1, backend=backend)
    assert gradient.sum(1).abs().max() < 1e-15
    assert (gradient[torch.arange(4), target] < 0).all()


@each_backend
def test_indices_in_int32(backend: str) -> None:
    x, target = torch.randn(5, 9), torch.tensor([0, 8, -100, 3, 4])
    found = cross_entropy(x, target.int(), backend=backend)
    torch.testing.assert_close(found, F.cross_entropy(x, target))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("wrong", [7, -1, -101])
def test_target_out_of_range_is_an_error_on_a_cpu(backend: str, wrong: int) -> None:
    message = rf"target 1 is {wrong}; legal are 0 to 6, for 7 classes, and the ignore_index -100"
    with pytest.raises(KernelInputError, match=message):
        cross_entropy(torch.randn(3, 7), torch.tensor([0, wrong, 2]), backend=backend)


@pytest.mark.parametrize("wrong", [7, -1])
@pytest.mark.parametrize("weighted", [False, True])
def test_target_out_of_range_is_nan_on_a_gpu(wrong: int, weighted: bool) -> None:
    target, weight = torch.tensor([0, wrong, 2]), torch.rand(7) if weighted else None
    loss, gradient = _with_gradient(
        cross_entropy, torch.randn(3, 7), target, weight, reduction="none", backend="triton"
    )
    assert loss.isnan().tolist() == [False, True, False]
    assert gradient.isnan().all(1).tolist() == [False, True, False]
    mean = cross_entropy(torch.randn(3, 7), target, weight, backend="triton")
    assert mean.isnan()


X, Y = torch.zeros(2, 3), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X[None], Y[None]), {}, r"\(1, 2, 3\): flatten them to logits.flatten\(0, -2\)"),
        ((X[:, :0], Y), {}, r"at least one class, found \(2, 0\)"),
        ((Y, Y[0]), {}, "floating-point logits, found torch.int64"),
        ((X, Y[:1]), {}, r"target of shape \(2,\) for logits of shape \(2, 3\), found \(1,\)"),
        ((X, Y.float()), {}, "int64 or int32, found a target in torch.float32"),
        ((X, Y, X[0, :2]), {}, r"weight of shape \(3,\), one for each class, found"),
        ((X, Y, torch.ones(3).long()), {}, "floating-point weight .* found torch.int64"),
        ((X, Y, torch.ones(3, requires_grad=True)), {}, r"pass weight.detach\(\)"),
        ((X, Y), {"reduction": "max"}, "'max'; there are mean, sum, none"),
        ((X, Y), {"label_smoothing": 1.5}, "label_smoothing from 0 to 1, found 1.5"),
        ((X, Y), {"z_loss": -1.0}, "z_loss of at least 0, found -1.0"),
    ],
)
def test_errors(arguments: tuple[Tensor, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelInputError, match=message):
        cross_entropy(*arguments, **options)


@each_backend
def test_keeps_the_logits_and_a_number_a_token(backend: str) -> None:
    x, kept = torch.randn(4, 50, dtype=torch.bfloat16, requires_grad=True), []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        cross_entropy(x, torch.tensor([0, 1, 2, 3]), reduction="sum", backend=backend)
    assert all(t.data_ptr() == x.data_ptr() or t.numel() <= 4 for t in kept)
