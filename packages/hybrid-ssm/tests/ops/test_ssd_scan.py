"""``ssd_scan`` on every backend."""

import math
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fivefold.hybrid_ssm.errors import HybridInputError
from fivefold.hybrid_ssm.ops.ssd_scan import cpu, mamba, op, ssd_scan
from fivefold.hybrid_ssm.ops.ssd_scan.samples import SAMPLES, eager
from fivefold.kernels.errors import BackendError
from fivefold.kernels.testing import assert_close, checks, op_tests

# Not mamba, which nobody needs to have.
BACKENDS = ("triton", "cpu", "reference")

Laws: Any = op_tests(SAMPLES, ops=(op.ssd_scan_forward, op.ssd_scan_backward))


class TestLaws(Laws):
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_no_backend_refuses_everything(self, backend: str) -> None:
        checks.check_takes_some(SAMPLES, backend)


def leaves(
    num_tokens: int, *, batch: int = 2, heads: int = 4, head_dim: int = 6, groups: int = 2
) -> dict[str, Tensor]:
    """Inputs in float64 of a state of 5 values."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    found = {
        "x": normal(batch, num_tokens, heads, head_dim),
        "dt": normal(batch, num_tokens, heads),
        "A": -normal(heads).abs(),
        "B": normal(batch, num_tokens, groups, 5),
        "C": normal(batch, num_tokens, groups, 5),
        "D": normal(heads),
        "dt_bias": normal(heads),
        "initial_state": normal(batch, heads, head_dim, 5),
    }
    return {name: x.requires_grad_() for name, x in found.items()}


def run(inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
    """Results and all gradients, for fixed weights of the results."""
    options = {"dt_softplus": True, "return_final_state": True} | options
    outputs = ssd_scan(**inputs, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in outputs]
    return (*outputs, *torch.autograd.grad(outputs, list(inputs.values()), weights))


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 15, 16, 17, 55, 63, 64, 65, 199])
def test_every_length_in_cpp(num_tokens: int) -> None:
    inputs = leaves(num_tokens)
    expected = run(inputs, backend="reference")
    for chunk_size in (None, 16):
        found_all = run(inputs, backend="cpu", chunk_size=chunk_size)
        for found, wanted in zip(found_all, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(backend: str) -> None:
    inputs = leaves(5, batch=1, heads=2, head_dim=2, groups=1)
    names = list(inputs)
    seq_ids = torch.tensor([[1, 1, 4, 4, 4]])

    def function(*tensors: Tensor) -> Any:
        return ssd_scan(
            **dict(zip(names, tensors, strict=True)),
            dt_softplus=True,
            dt_limit=(0.2, 1.5),
            seq_ids=seq_ids,
            return_final_state=True,
            backend=backend,
        )

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_packed_documents_are_as_if_alone(backend: str) -> None:
    lengths = (1, 70, 3, 64)
    # The ids come back: documents are told apart by their neighbours.
    seq_ids = torch.cat([torch.full((1, n), i % 2) for i, n in enumerate(lengths)], 1)
    inputs = leaves(sum(lengths), batch=1)
    y, state, *gradients = run(inputs, seq_ids=seq_ids, backend=backend)
    expected, first = [], inputs["initial_state"]
    for part in zip(*(inputs[n].split(lengths, 1) for n in ("x", "dt", "B", "C")), strict=True):
        x, dt, B, C = part  # noqa: N806
        one_y, one_state = ssd_scan(
            x,
            dt,
            inputs["A"],
            B,
            C,
            D=inputs["D"],
            dt_bias=inputs["dt_bias"],
            dt_softplus=True,
            initial_state=first,
            return_final_state=True,
            backend="reference",
        )
        expected.append(one_y)
        first = None  # type: ignore[assignment]
    outputs = (torch.cat(expected, 1), one_state)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outputs]
    wanted = (*outputs, *torch.autograd.grad(outputs, list(inputs.values()), weights))
    for found, want in zip((y, state, *gradients), wanted, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_goes_on_from_its_final_state(backend: str) -> None:
    inputs = {name: x.detach() for name, x in leaves(20, batch=1).items()}
    options: dict[str, Any] = {
        **{name: inputs[name] for name in ("A", "D", "dt_bias")},
        "dt_softplus": True,
        "return_final_state": True,
        "backend": backend,
    }
    tokens = ("x", "dt", "B", "C")
    state = inputs["initial_state"]
    whole, last = ssd_scan(**{n: inputs[n] for n in tokens}, **options, initial_state=state)
    parts = []
    for start, stop in ((0, 0), (0, 1), (1, 14), (14, 20)):
        part = {name: inputs[name][:, start:stop] for name in tokens}
        y, state = ssd_scan(**part, **options, initial_state=state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state, last, rtol=1e-11, atol=1e-11)


def test_eager_form_and_ours_agree() -> None:
    inputs = {name: x.detach().float() for name, x in leaves(37).items()}
    options = {"dt_softplus": True, "dt_limit": (0.1, 2.0), "return_final_state": True}
    found = ssd_scan(**inputs, **options)
    expected = eager(**inputs, **options, chunk_size=8)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_the_heads(threads: int) -> None:
    inputs = leaves(40, batch=1, heads=12, groups=1)
    alone = run(inputs, backend="cpu")
    torch.set_num_threads(threads)
    together, again = run(inputs, backend="cpu"), run(inputs, backend="cpu")
    for one, many, repeated in zip(alone, together, again, strict=True):
        torch.testing.assert_close(many, one, rtol=1e-11, atol=1e-11)
        assert torch.equal(many, repeated)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unwanted_final_state_has_no_part_in_gradients(backend: str) -> None:
    inputs = leaves(18, batch=1, heads=2, groups=1)
    with_state = ssd_scan(**inputs, dt_softplus=True, return_final_state=True, backend=backend)
    alone = ssd_scan(**inputs, dt_softplus=True, backend=backend)
    values = list(inputs.values())
    one = torch.autograd.grad(with_state[0].sum() + 0 * with_state[1].sum(), values)
    for found, expected in zip(torch.autograd.grad(alone.sum(), values), one, strict=True):
        torch.testing.assert_close(found, expected)
    of_state = ssd_scan(**inputs, dt_softplus=True, return_final_state=True, backend=backend)[1]
    assert (torch.autograd.grad(of_state.sum(), inputs["C"])[0] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_value_of_a_head(backend: str) -> None:
    inputs = {name: x.detach() for name, x in leaves(20, batch=1, heads=2, groups=1).items()}
    inputs["x"][0, 7, 1, 0] = math.nan
    y = ssd_scan(**inputs, dt_softplus=True, backend=backend)
    assert y[:, 7:, 1, 0].isnan().all()
    # Products of tiles take it to tokens before it too, and to no other value or head.
    assert not y[:, :, 0].isnan().any() and not y[:, :, 1, 1:].isnan().any()


def test_scratch_does_not_grow_with_the_length() -> None:
    def taken(num_tokens: int) -> int:
        sizes = op.ssd_scan_forward  # the op's own results are all that torch allocates
        x = torch.randn(1, num_tokens, 8, 16)
        dt, B = torch.rand(1, num_tokens, 8), torch.randn(1, num_tokens, 1, 16)  # noqa: N806
        with torch.profiler.profile(profile_memory=True) as profile:
            sizes(x, dt, -torch.ones(8), B, B, None, None, None, None, False, 0.0, 1.0, 0, "cpu")
        events = profile.events()
        return sum(e.self_cpu_memory_usage for e in events if e.self_cpu_memory_usage > 0)

    result = 8 * 16 * 4
    # Of each token the result, and a few numbers of each head.
    assert taken(4096) - taken(2048) <= 2048 * (result + 8 * 4 * 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 9, 4)}, "batch, tokens, heads, head_dim"),
        ({"B": torch.ones(2, 9, 3, 5)}, "groups divide the 4 heads"),
        ({"C": torch.ones(2, 9, 2, 4)}, r"C of shape \(2, 9, 2, 5\)"),
        ({"A": torch.ones(5)}, r"A of shape \(4,\)"),
        ({"dt": torch.ones(2, 8, 4)}, r"dt of shape \(2, 9, 4\)"),
        ({"initial_state": torch.ones(2, 4, 5, 6)}, r"initial_state of shape \(2, 4, 6, 5\)"),
        ({"seq_ids": torch.ones(2, 9)}, "seq_ids of integers"),
        ({"dt_limit": (1.0, 0.5)}, r"\(least, greatest\)"),
        ({"chunk_size": 0}, "at least 1"),
        ({"D": torch.ones(4, device="meta")}, "one device"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    inputs: dict[str, Any] = {name: x.detach() for name, x in leaves(9).items()}
    with pytest.raises(HybridInputError, match=message):
        ssd_scan(**(inputs | change))


def test_mamba_is_asked_in_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("mamba_ssm.ops.triton.ssd_combined")

    def theirs(x: Tensor, *tensors: Tensor, **options: Any) -> Any:
        *four, chunk_size = tensors
        options["initial_state"] = options.pop("initial_states")
        options["seq_ids"] = options.pop("seq_idx")
        options["return_final_state"] = options.pop("return_final_states")
        return ssd_scan(x, *four, **options, chunk_size=chunk_size, backend="reference")

    module.mamba_chunk_scan_combined = theirs  # type: ignore[attr-defined]
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    tensors = [x.detach() for x in leaves(12, batch=1).values()]
    documents = torch.tensor([[0] * 5 + [1] * 7], dtype=torch.int32)
    arguments = (*tensors, documents, True, 0.1, 2.0, 0)
    y, state = mamba.ssd_scan_forward(*arguments)
    expected = cpu.ssd_scan_forward(*arguments)
    torch.testing.assert_close((y, state), expected)
    dy = torch.randn_like(y)
    for dstate in (None, torch.randn_like(state)):
        found = mamba.ssd_scan_backward(dy, dstate, *arguments)
        torch.testing.assert_close(found, cpu.ssd_scan_backward(dy, dstate, *arguments))


def test_mamba_is_refused_without_a_gpu() -> None:
    x = torch.ones(1, 1, 1, 1)
    with pytest.raises(BackendError, match="mamba"):
        ssd_scan(x, x[..., 0], -torch.ones(1), x, x, backend="mamba")


def test_bfloat16_is_computed_in_float32() -> None:
    inputs = {name: x.detach() for name, x in leaves(70).items()}
    state = ("A", "D", "dt_bias", "initial_state")
    coarse = {n: x.float() if n in state else x.bfloat16() for n, x in inputs.items()}
    y, last = ssd_scan(**coarse, dt_softplus=True, return_final_state=True, backend="cpu")
    exact = {name: x.double() for name, x in coarse.items()}
    wanted = ssd_scan(**exact, dt_softplus=True, return_final_state=True, backend="reference")
    assert y.dtype == torch.bfloat16 and last.dtype == torch.float32
    assert_close("final state", last, wanted[1], torch.float32)
