"""``rms_norm`` on every backend."""

import pytest
import torch
import torch.nn.functional as F

from fivefold.kernels.ops.rms_norm import op, rms_norm
from fivefold.kernels.ops.rms_norm.samples import SAMPLES
from fivefold.kernels.testing import assert_close, memory, op_tests

TestLaws = op_tests(SAMPLES, ops=(op.rms_norm_forward, op.rms_norm_backward))

BACKENDS = op.BACKENDS


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_equals_torch(backend: str, dtype: torch.dtype) -> None:
    x, weight = torch.randn(4, 9, 65).to(dtype), torch.randn(65).to(dtype)
    found = rms_norm(x, (65,), weight, 0.01, backend=backend)
    assert_close("rms_norm", found, F.rms_norm(x.double(), (65,), weight.double(), 0.01), dtype)
    bare = rms_norm(x, (65,), backend=backend)
    eps = torch.finfo(dtype).eps
    assert_close("rms_norm", bare, F.rms_norm(x.double(), (65,), None, eps), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_values(backend: str) -> None:
    rows = torch.cat([torch.zeros(1, 70), torch.full((1, 70), 1e15), torch.randn(3, 70)])
    rows[2, 0], rows[3, 69] = torch.inf, torch.nan
    y = rms_norm(rows, (70,), eps=1e-6, backend=backend)
    assert torch.equal(y[0], torch.zeros(70))
    torch.testing.assert_close(y[1], torch.ones(70))
    assert y[2, 0].isnan() and torch.equal(y[2, 1:], torch.zeros(69))
    assert y[3].isnan().all()
    torch.testing.assert_close(y[4], F.rms_norm(rows[4], (70,), None, 1e-6))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_follow_are_left_alone(backend: str) -> None:
    # Not NaN, which would pass for the poison where it is written.
    x = torch.randn(9, 24, dtype=torch.float64)[:5].requires_grad_()
    weight = torch.randn(24, dtype=torch.float64)
    dy = torch.randn(9, 24, dtype=torch.float64)[:5]
    with memory.poisoned():
        y = rms_norm(x, (24,), weight, backend=backend)
        torch.autograd.grad(y, x, dy)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_the_rows(threads: int) -> None:
    x, gate, dy = torch.randn(3, 700, 96, dtype=torch.float64)
    weight = torch.randn(96, dtype=torch.float64)

    def run() -> tuple[torch.Tensor, ...]:
        leaves = [each.clone().requires_grad_() for each in (x, weight, gate)]
        y = rms_norm(leaves[0], (96,), leaves[1], gate=leaves[2], group_size=48, backend="cpu")
        return (y, *torch.autograd.grad(y, leaves, dy))

    alone = run()
    torch.set_num_threads(threads)
    together, again = run(), run()
    for one, many, repeated in zip(alone, together, again, strict=True):
        torch.testing.assert_close(many, one)
        assert torch.equal(many, repeated)
