"""``causal_conv1d`` on every backend."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fivefold.hybrid_ssm.errors import HybridInputError
from fivefold.hybrid_ssm.ops.causal_conv1d import causal_conv1d, op
from fivefold.hybrid_ssm.ops.causal_conv1d.samples import SAMPLES
from fivefold.kernels.testing import op_tests

TestLaws = op_tests(SAMPLES, ops=(op.causal_conv1d_forward, op.causal_conv1d_backward))

BACKENDS = op.BACKENDS


def test_no_document_sees_another() -> None:
    seq_ids = torch.tensor([[3, 3, 1, 3, 3, 3, 3]])
    x, weight, bias = torch.randn(1, 7, 5), torch.randn(5, 4), torch.randn(5)
    y, state = causal_conv1d(x, weight, bias, seq_ids=seq_ids, return_final_state=True)
    parts = [causal_conv1d(part, weight, bias) for part in x.split((2, 1, 4), 1)]
    torch.testing.assert_close(y, torch.cat(parts, 1))
    assert torch.equal(state, x[:, 4:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 4, 9])
def test_equals_torch_and_goes_on(backend: str, num_tokens: int) -> None:
    x, weight, bias = torch.randn(2, 9, 6), torch.randn(6, 4), torch.randn(6)
    expected = F.conv1d(x.mT, weight.unsqueeze(1), bias, padding=3, groups=6)[..., :9].mT
    options = {"return_final_state": True, "backend": backend}
    first, state = causal_conv1d(x[:, :num_tokens], weight, bias, **options)
    rest, last = causal_conv1d(x[:, num_tokens:], weight, bias, initial_state=state, **options)
    torch.testing.assert_close(torch.cat([first, rest], 1), F.silu(expected))
    assert torch.equal(last, x[:, 6:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(9, 6)}, "batch, tokens, channels"),
        ({"weight": torch.ones(6)}, "taps"),
        ({"weight": torch.ones(5, 4)}, r"weight of shape \(6, 4\)"),
        ({"bias": torch.ones(5)}, r"bias of shape \(6,\)"),
        ({"activation": "gelu"}, "'gelu'"),
        ({"initial_state": torch.ones(2, 4, 6)}, r"initial_state of shape \(2, 3, 6\)"),
        ({"initial_state": torch.ones(2, 3, 6).double()}, "float64"),
        ({"seq_ids": torch.ones(2, 9)}, "integers"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    inputs: dict[str, Any] = {"x": torch.ones(2, 9, 6), "weight": torch.ones(6, 4)}
    with pytest.raises(HybridInputError, match=message):
        causal_conv1d(**(inputs | change))
