import pytest
import torch
from torch import Tensor

from fivefold.moe import TokenDispatcher
from fivefold.moe.dispatch import take_rows


def routing(num_tokens: int, num_experts: int, k: int) -> Tensor:
    return torch.rand(num_tokens, num_experts).argsort(dim=1)[:, :k]


@pytest.mark.parametrize(
    ("tokens", "num_experts", "k"), [(7, 4, 2), (1, 3, 3), (5, 6, 1), (0, 2, 1)]
)
def test_rows_are_sorted_by_expert_and_token(tokens: int, num_experts: int, k: int) -> None:
    x, experts = torch.randn(tokens, 3), routing(tokens, num_experts, k)
    rows, counts, _ = TokenDispatcher(num_experts).dispatch(x, experts)
    wanted = [x[n] for e in range(num_experts) for n in range(tokens) if e in experts[n]]
    assert torch.equal(rows, torch.stack(wanted) if wanted else x.new_zeros(0, 3))
    assert counts.dtype == torch.int64
    assert counts.tolist() == [int((experts == e).sum()) for e in range(num_experts)]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_combine_undoes_dispatch(k: int) -> None:
    dispatcher, experts = TokenDispatcher(4), routing(9, 4, k)
    x = torch.randn(9, 3, dtype=torch.float64)
    weights = torch.rand(9, k, dtype=torch.float64)
    rows, counts, state = dispatcher.dispatch(x, experts)
    scale = torch.arange(1.0, 5.0, dtype=torch.float64).repeat_interleave(counts)
    out = dispatcher.combine(rows * scale[:, None], weights, state)
    torch.testing.assert_close(out, x * (weights * (experts + 1)).sum(1, keepdim=True))


def test_gradients() -> None:
    experts = routing(5, 3, 2)

    def run(x: Tensor, weights: Tensor) -> Tensor:
        dispatcher = TokenDispatcher(3)
        rows, _, state = dispatcher.dispatch(x, experts)
        return dispatcher.combine(rows.square(), weights, state)

    inputs = (
        torch.randn(5, 2, dtype=torch.float64, requires_grad=True),
        torch.randn(5, 2, dtype=torch.float64, requires_grad=True),
    )
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_gradients_without_tokens() -> None:
    x = torch.zeros(0, 3, requires_grad=True)
    weights = torch.zeros(0, 2, requires_grad=True)
    dispatcher = TokenDispatcher(4)
    rows, counts, state = dispatcher.dispatch(x, torch.zeros(0, 2, dtype=torch.int64))
    dispatcher.combine(rows, weights, state).sum().backward()
    assert counts.tolist() == [0, 0, 0, 0]
    assert x.grad is not None and x.grad.shape == (0, 3)


def test_take_rows_is_a_permutation_with_its_inverse_as_gradient() -> None:
    x = torch.randn(4, 2, requires_grad=True)
    index = torch.tensor([2, 0, 3, 1])
    rows = take_rows(x, index, index.argsort())
    assert torch.equal(rows, x[index])
    grad = torch.randn(4, 2)
    rows.backward(grad)
    assert x.grad is not None and torch.equal(x.grad[index], grad)
