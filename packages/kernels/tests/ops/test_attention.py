"""``attention`` on every backend, against torch's own, and put together from parts."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fivefold.kernels.errors import BackendError, KernelInputError
from fivefold.kernels.ops.attention import attention, op
from fivefold.kernels.ops.attention.samples import SAMPLES, eager
from fivefold.kernels.testing import assert_close, op_tests
from fivefold.kernels.testing.checks import differentiate

TestLaws = op_tests(SAMPLES, ops=(op.attention_forward, op.attention_backward))
F64 = torch.float64


def _leaf(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


def _operands(
    *lead: int, heads: int = 4, keys: int = 2, lengths: tuple[int, int] = (9, 13), width: int = 8
) -> dict[str, Tensor]:
    return {
        "query": _leaf(*lead, heads, lengths[0], width),
        "key": _leaf(*lead, keys, lengths[1], width),
        "value": _leaf(*lead, keys, lengths[1], width),
    }


def _same(found: Any, expected: Any, inputs: dict[str, Any]) -> None:
    """Equal results and gradients."""
    found, expected = differentiate(found, inputs), differentiate(expected, inputs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(name, found[name], value, value.dtype)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3, "is_causal": True},
        {"scale": -0.7},
    ],
    ids=str,
)
def test_equals_torch(options: dict[str, Any], backend: str) -> None:
    inputs = _operands(3)
    _same(
        lambda: attention(**inputs, **options, backend=backend),
        lambda: F.scaled_dot_product_attention(*inputs.values(), **options, enable_gqa=True),
        inputs,
    )


@pytest.mark.parametrize("backend", [None, "reference", "triton"])
@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_any_scale(scale: float, backend: str | None) -> None:
    operands = _operands(lengths=(5, 7), heads=1, keys=1)
    inputs = operands | {"is_causal": True, "causal_offset": 2}
    scaled = operands | {"query": operands["query"] * scale}
    _same(
        lambda: attention(**inputs, scale=scale, backend=backend),
        lambda: eager(**inputs | scaled, scale=1.0),
        operands,
    )


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize(
    "shape", [(2, 3, 4, 9, 13), (3, 1, 9, 13), (2, 1, 4, 1, 13), (9, 1), (1,), ()], ids=str
)
def test_a_bias_equals_scores_written_out(shape: tuple[int, ...], backend: str | None) -> None:
    inputs = _operands(2, 3) | {"bias": _leaf(*shape)}

    def written_out() -> tuple[Tensor, Tensor]:
        key, value = (inputs[name].repeat_interleave(2, -3) for name in ("key", "value"))
        scores = inputs["query"] @ key.mT / 8**0.5 + inputs["bias"]
        return scores.softmax(-1) @ value, scores.logsumexp(-1)

    # With the log-sum-exp: without it a bias that all keys share has a gradient of 0.
    _same(lambda: attention(**inputs, return_lse=True, backend=backend), written_out, inputs)
    _same(
        lambda: attention(**inputs, backend=backend).detach(),
        lambda: eager(**inputs | {"bias": inputs["bias"].expand(2, 3, 4, 9, 13)}).detach(),
        inputs,
    )


@pytest.mark.parametrize("backend", ["cpu", "aten", "reference"])
@pytest.mark.parametrize(
    "options",
    [
        {"causal_offset": 4},
        {"causal_offset": 20},
        {"causal_offset": 4, "window": 3},
        {"window": 2},
        {"window": 50},
    ],
    ids=str,
)
def test_band_equals_a_mask_written_out(options: dict[str, int], backend: str) -> None:
    inputs = _operands(2) | options | {"is_causal": True}
    _same(lambda: attention(**inputs, backend=backend), lambda: eager(**inputs), inputs)


@pytest.mark.parametrize("backend", ["cpu", "aten", "reference"])
def test_a_mask_of_keys_equals_torchs(backend: str) -> None:
    key_mask = torch.rand(2, 3, 13) < 0.5
    key_mask[..., 0] = True
    inputs = _operands(2, 3) | {"key_mask": key_mask}
    _same(lambda: attention(**inputs, backend=backend), lambda: eager(**inputs), inputs)


def test_a_mask_broadcasts() -> None:
    operands = _operands(2, 3)
    key_mask = torch.arange(13) < 5
    found = attention(**operands, key_mask=key_mask)
    assert_close("result", found, attention(**operands, key_mask=key_mask.expand(2, 3, 13)), F64)
    assert_close(
        "result",
        found,
        attention(operands["query"], operands["key"][..., :5, :], operands["value"][..., :5, :]),
        F64,
    )


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_parts_of_the_keys_combine_to_the_whole(backend: str) -> None:
    """As ring attention does: causal within a part, through the log-sum-exp between parts."""
    inputs = _operands(heads=2, keys=1, lengths=(6, 10))
    query, key, value = inputs.values()

    def parts() -> Tensor:
        outs, lses = [], []
        for start, stop in ((0, 4), (4, 10)):
            out, lse = attention(
                query,
                key[:, start:stop],
                value[:, start:stop],
                is_causal=True,
                causal_offset=3 - start,
                return_lse=True,
                backend=backend,
            )
            outs.append(out)
            lses.append(lse)
        weights = torch.softmax(torch.stack(lses), 0)
        return (torch.stack(outs) * weights.unsqueeze(-1)).sum(0)

    _same(parts, lambda: eager(**inputs, is_causal=True, causal_offset=3), inputs)


@pytest.mark.parametrize("backend", ["aten", "reference", "triton"])
def test_what_sees_nothing(backend: str) -> None:
    inputs = _operands(heads=2, keys=1, lengths=(5, 3)) | {
        "is_causal": True,
        "causal_offset": -2,
    }
    out, lse = attention(**inputs, return_lse=True, backend=backend)
    assert (out[:, :2] == 0).all() and (lse[:, :2] == -torch.inf).all()
    assert lse[:, 2:].isfinite().all()
    gradients = torch.autograd.grad(out.sum(), [inputs[n] for n in ("query", "key", "value")])
    assert all(each.isfinite().all() for each in gradients)
    assert (gradients[0][:, :2] == 0).all()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_nan_in_the_gradient_of_an_empty_log_sum_exp_goes_nowhere(backend: str) -> None:
    inputs = _operands(heads=1, keys=1, lengths=(3, 3)) | {"key_mask": torch.zeros(3).bool()}
    _, lse = attention(**inputs, return_lse=True, backend=backend)
    sources = [inputs[name] for name in ("query", "key", "value")]
    gradients = torch.autograd.grad(lse, sources, torch.full_like(lse, torch.nan))
    assert all((each == 0).all() for each in gradients)


@pytest.mark.parametrize("backend", ["aten", "reference", "triton"])
def test_large_scores(backend: str) -> None:
    query = torch.full((1, 2, 4), 60.0, requires_grad=True)
    key = torch.tensor([[[60.0] * 4, [-60.0] * 4, [59.0] * 4]])
    out, lse = attention(query, key, key, scale=1.0, return_lse=True, backend=backend)
    torch.testing.assert_close(out, key[:, :1].expand(1, 2, 4))
    torch.testing.assert_close(lse, torch.full((1, 2), 14400.0))


@pytest.mark.parametrize("backend", ["aten", "reference", "triton"])
def test_minus_infinity_in_a_bias_hides(backend: str) -> None:
    operands = _operands(heads=1, keys=1, lengths=(2, 3))
    bias = torch.tensor([[0.0, -torch.inf, 0.0], [-torch.inf] * 3], dtype=F64)
    out, lse = attention(**operands, bias=bias, return_lse=True, backend=backend)
    kept = [operands[name][:, [0, 2]] for name in ("key", "value")]
    expected = attention(operands["query"], *kept)
    assert_close("seen", out[:, :1], expected[:, :1], F64)
    assert (out[:, 1] == 0).all() and (lse[:, 1] == -torch.inf).all()


def test_the_heads_of_a_position_lie_side_by_side() -> None:
    operands = _operands(2, 3)
    for backend in ("aten", "reference", "triton"):
        out = attention(**{n: x[:1, :1] for n, x in operands.items()}, backend=backend)
        assert out.transpose(-3, -2).is_contiguous()


def test_scores_in_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = _operands(2) | {"bias": _leaf(9, 13), "is_causal": True, "return_lse": True}
    whole = differentiate(lambda: attention(**inputs, backend="reference"), inputs)
    monkeypatch.setattr("fivefold.kernels.ops.attention.reference._SCORES_AT_ONCE", 2 * 4 * 13 * 4)
    pieces = differentiate(lambda: attention(**inputs, backend="reference"), inputs)
    for name, value in whole.items():
        assert_close(name, pieces[name], value, F64)


def test_gradcheck() -> None:
    inputs = _operands(heads=2, keys=1, lengths=(3, 4), width=2) | {"bias": _leaf(2, 1, 4)}

    def call(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Any:
        return attention(query, key, value, bias, is_causal=True, causal_offset=1, return_lse=True)

    assert torch.autograd.gradcheck(call, tuple(inputs.values()))


def test_backends_by_what_they_can() -> None:
    operands = [x[None] for x in _operands(1).values()]
    call = (*operands, None, None, None, None, 0.5)
    assert op.attention_forward.choose(call) == "cpu"

    def refusal(*call: Any) -> str:
        named = op.attention_forward if len(call) == 8 else op.attention_backward
        return named.refusal("aten", call) or ""

    shared = operands[0].expand(1, 2, 4, 9, 8)
    assert refusal(*call) == ""
    assert "empty" in refusal(*(x[..., :0, :] for x in operands), *call[3:])
    out, lse = op.attention_forward(*call, None)
    saved = (*operands, None, None, out, lse, None, None, 0.5)
    assert refusal(out, None, *saved, False) == ""
    assert "log-sum-exp" in refusal(out, lse, *saved, False)
    assert "bias" in refusal(out, None, *saved, True)
    rows = (shared, operands[1].expand(1, 2, -1, -1, -1), operands[2].expand(1, 2, -1, -1, -1))
    bias, mask = torch.zeros(1, 1, 1, 13, dtype=F64), torch.ones(1, 2, 13).bool()
    assert refusal(*rows, bias, None, None, None, 0.5) == ""
    assert "spread the bias" in refusal(*rows, bias, mask, None, None, 0.5)
    assert "torch.float16" in refusal(*call[:3], bias.half(), *call[4:])


@pytest.mark.parametrize(("rows", "threads"), [(5, 3), (2, 7), (1, 2)])
def test_threads_share_the_rows_of_a_bias(rows: int, threads: int) -> None:
    inputs = _operands(rows, heads=2, keys=1, lengths=(67, 130), width=3)
    inputs |= {"bias": _leaf(2, 67, 130), "key_mask": torch.rand(rows, 130) < 0.8}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _same(
            lambda: attention(**inputs, backend="cpu"),
            lambda: attention(**inputs, backend="reference"),
            inputs,
        )
    finally:
        torch.set_num_threads(before)


def test_widths_that_no_kernel_takes() -> None:
    wide = torch.zeros(1, 2, 257)
    with pytest.raises(BackendError, match="up to 256, this is 257"):
        attention(wide, wide, wide, backend="triton")
    with pytest.raises(BackendError, match="as wide as its key, found 257 and 5"):
        attention(wide, wide, wide[..., :5], backend="aten")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(2, 3, 4).int()}, "one floating-point dtype, found torch.int32"),
        ({"key": torch.zeros(2, 5, 4).half()}, "found torch.float32, torch.float16"),
        ({"query": torch.zeros(3, 4)}, r"\(..., heads, length, width\): query \(3, 4\)"),
        ({"query": torch.zeros(7, 2, 3, 4)}, r"equal leading dims.*query \(7, 2, 3, 4\)"),
        ({"value": torch.zeros(2, 6, 4)}, r"a value for every key, found .*value \(2, 6, 4\)"),
        ({"query": torch.zeros(2, 3, 5)}, r"one width.*found query \(2, 3, 5\)"),
        ({"value": torch.zeros(2, 5, 0)}, r"no widths of 0, found .*value \(2, 5, 0\)"),
        ({"query": torch.zeros(3, 3, 4)}, "divides, found 3 and 2"),
        ({"bias": torch.zeros(3, 5).bool()}, "floating-point bias, found torch.bool"),
        ({"bias": torch.zeros(2, 5)}, r"broadcasts to \(2, 3, 5\), found \(2, 5\)"),
        ({"bias": torch.zeros(1, 2, 3, 5)}, r"broadcasts to \(2, 3, 5\), found \(1, 2, 3, 5\)"),
        ({"key_mask": torch.zeros(5)}, "bool key_mask, found torch.float32"),
        ({"key_mask": torch.zeros(4).bool()}, r"key_mask that broadcasts to \(5,\), found \(4,\)"),
        ({"window": 3}, "without is_causal=True, found causal_offset=0, window=3"),
        ({"causal_offset": 3}, "without is_causal=True, found causal_offset=3"),
        ({"is_causal": True, "window": 0}, "window of at least 1, found 0"),
    ],
)
def test_says_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    operands = {
        "query": torch.zeros(2, 3, 4),
        "key": torch.zeros(2, 5, 4),
        "value": torch.zeros(2, 5, 4),
    }
    with pytest.raises(KernelInputError, match=message):
        attention(**(operands | changes))


def test_no_heads() -> None:
    with pytest.raises(KernelInputError, match="found 0 and 0"):
        attention(*[torch.zeros(0, 3, 4)] * 3)
