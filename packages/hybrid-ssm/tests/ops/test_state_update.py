"""``state_update`` on every backend."""

import pytest
import torch
from torch import Tensor

from fivefold.hybrid_ssm.errors import HybridInputError
from fivefold.hybrid_ssm.ops.ssd_scan import ssd_scan
from fivefold.hybrid_ssm.ops.state_update import op, state_update, state_update_
from fivefold.hybrid_ssm.ops.state_update.samples import SAMPLES
from fivefold.kernels.testing import assert_close, op_tests

TestLaws = op_tests(SAMPLES, ops=(op.state_update_step,))


def tensors(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The state, x, dt, A, B and C."""
    shapes = ((2, 4, 3, 5), (2, 4, 3), (2, 4), (4,), (2, 2, 5), (2, 2, 5))
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("backend", op.BACKENDS)
def test_steps_are_the_scan(backend: str) -> None:
    options = {"dt_softplus": True, "dt_limit": (0.1, 0.9)}
    calls = [tensors() for _ in range(6)]
    A, state = -calls[0][3].abs(), calls[0][0]  # noqa: N806
    x, dt, _, B, C = (torch.stack(each, 1) for each in list(zip(*calls, strict=True))[1:])  # noqa: N806
    y, last = ssd_scan(x, dt, A, B, C, **options, initial_state=state, return_final_state=True)
    state = state.clone()
    for t in range(6):
        arguments = (x[:, t], dt[:, t], A, B[:, t], C[:, t])
        found = state_update_(state, *arguments, **options, backend=backend)
        torch.testing.assert_close(found, y[:, t], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state, last, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", op.BACKENDS)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_a_state_that_is_part_of_a_larger_tensor(backend: str, state_dtype: torch.dtype) -> None:
    state, *rest = tensors(torch.float32)
    cache = torch.zeros(2, 3, 4, 3, 5, dtype=state_dtype)
    cache[:, 1] = state
    expected_y, expected = state_update(cache[:, 1].double(), *(each.double() for each in rest))
    y = state_update_(cache[:, 1], *rest, backend=backend)
    assert_close("y", y, expected_y, torch.float32)
    assert_close("state", cache[:, 1], expected, state_dtype)
    assert (cache[:, 0] == 0).all() and (cache[:, 2] == 0).all()


def test_gradients_go_through_the_form_that_copies() -> None:
    leaves = [each.requires_grad_() for each in tensors()]
    assert torch.autograd.gradcheck(state_update, leaves)
    with pytest.raises(HybridInputError, match="has no gradient"):
        state_update_(*leaves)


def test_compiles_in_place() -> None:
    state, *rest = tensors()
    expected_y, expected = state_update(state, *rest)
    compiled = torch.compile(state_update_, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(state, *rest), expected_y)
    assert torch.equal(state, expected)


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (0, torch.ones(2, 4, 5, 3), r"state of shape \(2, 4, 3, 5\)"),
        (1, torch.ones(2, 4), "batch, heads, head_dim"),
        (2, torch.ones(2, 3), r"dt of shape \(2, 4\)"),
        (4, torch.ones(2, 3, 5), "groups divide the 4 heads"),
    ],
)
def test_what_does_not_fit_is_named(place: int, wrong: Tensor, message: str) -> None:
    inputs = tensors()
    inputs[place] = wrong
    with pytest.raises(HybridInputError, match=message):
        state_update(*inputs)
