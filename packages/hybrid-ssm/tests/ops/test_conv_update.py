"""``conv_update`` on every backend."""

from typing import Any

import pytest
import torch

from fivefold.hybrid_ssm.errors import HybridInputError
from fivefold.hybrid_ssm.ops.causal_conv1d import causal_conv1d
from fivefold.hybrid_ssm.ops.conv_update import conv_update, conv_update_, op
from fivefold.hybrid_ssm.ops.conv_update.samples import SAMPLES
from fivefold.kernels.testing import op_tests

TestLaws = op_tests(SAMPLES, ops=(op.conv_update_step,))


@pytest.mark.parametrize("backend", op.BACKENDS)
def test_steps_are_the_sequence(backend: str) -> None:
    x, weight, bias = torch.randn(2, 6, 5), torch.randn(5, 4), torch.randn(5)
    state = torch.zeros(2, 3, 5)
    steps = [conv_update_(state, x[:, t], weight, bias, backend=backend) for t in range(6)]
    y, last = causal_conv1d(x, weight, bias, return_final_state=True)
    torch.testing.assert_close(torch.stack(steps, 1), y)
    assert torch.equal(state, last)


def test_gradients_go_through_the_form_that_copies() -> None:
    shapes = ((2, 3, 5), (2, 5), (5, 4), (5,))
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(conv_update, leaves)
    with pytest.raises(HybridInputError, match="has no gradient"):
        conv_update_(*leaves)


def test_compiles_in_place() -> None:
    x, weight, state = torch.randn(2, 5), torch.randn(5, 4), torch.randn(2, 3, 5)
    expected_y, expected = conv_update(state, x, weight)
    compiled = torch.compile(conv_update_, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(state, x, weight), expected_y)
    assert torch.equal(state, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 1, 5)}, "batch, channels"),
        ({"state": torch.ones(2, 4, 5)}, r"state of shape \(2, 3, 5\)"),
        ({"state": torch.ones(2, 3, 5).double()}, "dtype of x"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    inputs = {"state": torch.ones(2, 3, 5), "x": torch.ones(2, 5), "weight": torch.ones(5, 4)}
    with pytest.raises(HybridInputError, match=message):
        conv_update(**(inputs | change))
