"""The persistent kernel for GPUs: its own text, run on the CPU thread by thread."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fivefold.kernels import BackendError
from fivefold.kernels.launch import record
from fivefold.kernels.samples import Maker, Sample
from fivefold.sparse_rnn import SparseRNNTimeoutError, resident
from fivefold.sparse_rnn.ops.recurrence import cuda, recurrence, reference
from fivefold.sparse_rnn.ops.recurrence.cuda import Options
from fivefold.sparse_rnn.ops.recurrence.samples import SAMPLES, _sample
from fivefold.sparse_rnn.pack import pack

from .emulation import EmulationError, Emulator

ORDER = ("gates", "h0", "c0", "values", "crow", "col", "bias_n", "lengths", "cell", "reverse")
# Groups of four sequences and a rest, 2 blocks whose rows are cut, padded lanes.
LSTM = _sample("lstm", 3, 6, 21, 0.3, lengths=(2, 3, 1, 3, 2, 3))
RNN = _sample("rnn_tanh", 4, 2, 33, 0.3)


def _inputs(sample: Sample) -> list[Any]:
    made = sample.inputs(Maker(dtype=torch.float32))
    return [x.detach() if isinstance(x, Tensor) else x for x in (made[name] for name in ORDER)]


def _as(inputs: list[Any], dtype: torch.dtype) -> list[Any]:
    return [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]


def _close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-6, atol=2e-6)


def _gradient_inputs(inputs: list[Any]) -> list[Any]:
    """Those of the gradient, in float64."""
    wide = _as(inputs, torch.float64)
    y, h, c, saved = reference.recurrence_forward(*wide, True)
    dc = torch.randn_like(c) if c.numel() else None
    _, h0, c0, values, crow, col, _, lengths, cell, reverse = wide
    first = [torch.randn_like(y), torch.randn_like(h), dc, y, saved]
    return [*first, h0, c0, values, crow, col, lengths, cell, reverse]


def _check(emulator: Emulator, inputs: list[Any]) -> None:
    """Results and gradients are those of the specification in float64."""
    with emulator.running():
        found = cuda.recurrence_forward(*inputs, True)
        _close(found, reference.recurrence_forward(*_as(inputs, torch.float64), True))
        gradient = _gradient_inputs(inputs)
        found = cuda.recurrence_backward(*_as(gradient, torch.float32))
        _close(found, reference.recurrence_backward(*gradient))


@pytest.mark.parametrize("sample", [*SAMPLES.small, LSTM], ids=lambda sample: sample.name)
def test_values_and_gradients(sample: Sample, tmp_path: Path) -> None:
    _check(Emulator(tmp_path), _inputs(sample))


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_threads_and_stores(seed: int, tmp_path: Path) -> None:
    emulator = Emulator(tmp_path, seed=seed)
    _check(emulator, _inputs(RNN))
    assert emulator.launches.count("recurrence_forward") == 1


def test_a_barrier_instead(tmp_path: Path) -> None:
    with cuda.using(Options(exchange="barrier")):
        _check(Emulator(tmp_path), _inputs(LSTM))


def test_as_many_as_fit_in_registers_and_the_rest_in_shared_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "MAX_REGISTER_WORDS", 6)
    _check(Emulator(tmp_path), _inputs(LSTM))


def test_units_in_another_order_and_rows_in_none(tmp_path: Path) -> None:
    with cuda.using(Options(permute=True, reorder=False, width=2)):
        _check(Emulator(tmp_path), _inputs(LSTM))


def test_long_sequences_take_several_launches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_SLOT_BYTES", 1)
    for lengths, reverse in ((None, False), ((2, 4, 1), True)):
        emulator = Emulator(tmp_path)
        _check(emulator, _inputs(_sample("gru", 4, 3, 9, 0.4, lengths=lengths, reverse=reverse)))
        assert emulator.launches.count("recurrence_forward") == 4
        assert emulator.launches.count("recurrence_backward") == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_of_16_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    inputs = _inputs(RNN)
    inputs[3] = inputs[3].to(dtype)
    with Emulator(tmp_path).running():
        y = cuda.recurrence_forward(*inputs, True)[0]
        rounded = reference.recurrence_forward(*_as(inputs, torch.float64), True)[0]
    torch.testing.assert_close(y.double(), rounded, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("values", ["float16", "bfloat16", "float32"])
def test_words_are_those_of_pack(values: str, tmp_path: Path) -> None:
    inputs = _inputs(RNN)
    emulator = Emulator(tmp_path)
    with emulator.running(), cuda.using(Options(values=values)):
        cuda.recurrence_forward(*inputs, False)
        matrix = cuda.resident(inputs[3], *inputs[4:6], inputs[1], "rnn_tanh", backward=False)
    made = matrix.tables
    assert made is not None
    padded = torch.cat([inputs[3], torch.zeros(1)])[made.source.long()]
    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[values]
    size = matrix.kernel.element_bytes
    expected = pack(
        padded.flatten(), made.offsets.flatten() // size, element_bytes=size, dtype=dtype
    )
    found = emulator.words[0].movedim(2, 3).flatten(0, 2)
    assert torch.equal(found if expected.wide else found.squeeze(1), expected.words)


def test_every_nonzero_is_once_in_the_tables(tmp_path: Path) -> None:
    inputs = _inputs(LSTM)
    with Emulator(tmp_path).running():
        for backward in (False, True):
            matrix = cuda.resident(inputs[3], *inputs[4:6], inputs[1], "lstm", backward=backward)
            made = matrix.tables
            assert made is not None
            numbers = made.source[made.source >= 0]
            assert torch.equal(numbers.sort().values, torch.arange(inputs[3].numel()).int())
            assert made.units.shape[0] == 3
            assert torch.equal(made.units[made.units >= 0].sort().values, torch.arange(21).int())


def test_nan_and_infinity_end_and_stay(tmp_path: Path) -> None:
    # The bits of the last are those of a word that is not there yet.
    empty = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
    for value in (torch.tensor(torch.nan), torch.tensor(torch.inf), empty):
        inputs = _inputs(_sample("rnn_relu", 3, 2, 33, 0.3))
        inputs[0][1, 0, 3] = value
        inputs[1][1, 5] = value
        with Emulator(tmp_path).running():
            y = cuda.recurrence_forward(*inputs, False)[0]
        expected = reference.recurrence_forward(*inputs, False)[0]
        finite, expected_finite = y.isfinite(), expected.isfinite()
        assert not finite[1, 0, 3] and not bool(finite[2].all())
        assert bool(finite[0, 0].all())
        # NaN reaches fewer units than through torch's dense product, whose zeros it passes. So does
        # infinity, but times the zero of a padded lane it is NaN where it might be minus infinity.
        assert value.isinf() or not bool((expected_finite & ~finite).any())
        both = finite & expected_finite
        torch.testing.assert_close(y[both], expected[both])


def test_who_waits_in_vain_gives_up(tmp_path: Path) -> None:
    # A unit whose state is never published.
    lost = (
        "int column, int j, float x) {\n",
        "int column, int j, float x) {\n  if (column == 7) return;\n",
    )
    inputs = _inputs(RNN)
    with Emulator(tmp_path, changes=[lost]).running(), cuda.using(Options(patience=300)):
        y, h_n, _, _ = cuda.recurrence_forward(*inputs, False)
        assert bool(h_n.isnan().all()) and bool(y.isnan().all())
        with pytest.raises(SparseRNNTimeoutError, match=r"more than 300 times"):
            cuda.recurrence_forward(*inputs, False)


MUTANTS = {
    "no sync after fetch": (
        "    gpu::sync();\n    if (*ints(kFailed)) return",
        "    if (*ints(kFailed)) return",
    ),
    "no sync after the products": (
        "    gpu::sync();\n    gpu::wait_async();",
        "    gpu::wait_async();",
    ),
    "no wait for copies": ("    gpu::wait_async();\n", ""),
    "one word of four is looked at": (
        "x.at[0] != kEmpty && x.at[1] != kEmpty && x.at[2] != kEmpty && x.at[3] != kEmpty",
        "x.at[0] != kEmpty",
    ),
    "states of the step before last": (
        "fetch(p, slot(p, step, group));",
        "fetch(p, slot(p, 0, group));",
    ),
    "copies into the stage in use": ("next_group, parity ^ 1);", "next_group, parity);"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_protocol_shows(name: str, tmp_path: Path) -> None:
    inputs = _inputs(RNN)
    expected = reference.recurrence_forward(*inputs, False)[0]
    wrong = 0
    for seed in range(4):
        with Emulator(tmp_path, changes=[MUTANTS[name]], seed=seed).running():
            try:
                y = cuda.recurrence_forward(*inputs, False)[0]
                wrong += not torch.allclose(y, expected, rtol=1e-5, atol=1e-5)
            except EmulationError:
                wrong += 1
    assert wrong


def test_a_matrix_without_room_is_refused_with_the_numbers() -> None:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    nonzeros = 5000 * 5000 * 9 // 10
    pattern = (empty(5001, dtype=torch.int32), empty(nonzeros, dtype=torch.int32))
    inputs = (empty(2, 4, 5000), empty(4, 5000), None, empty(nonzeros), *pattern)
    with record(), pytest.raises(BackendError, match=r"a block needs \d+ bytes of shared memory"):
        recurrence(*inputs, cell="rnn_tanh", backend="cuda")


def test_float64_is_refused() -> None:
    inputs = _as(_inputs(RNN), torch.float64)
    assert "these are float64" in str(cuda.refuses("recurrence_forward", *inputs, False))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on a GPU")
@pytest.mark.parametrize("exchange", ["lamport", "barrier"])
@pytest.mark.parametrize(
    "sample", [*SAMPLES.small, *SAMPLES.laptop], ids=lambda sample: sample.name
)
def test_on_a_gpu(sample: Sample, exchange: Any) -> None:
    made = sample.inputs(Maker(dtype=torch.float32, device="cuda"))
    sources = [x for x in made.values() if isinstance(x, Tensor) and x.requires_grad]
    results = []
    for backend in ("cuda", "reference"):
        with cuda.using(Options(exchange=exchange, permute=sample in SAMPLES.small)):
            y, h, _ = recurrence(**made, backend=backend)
            results.append([y, h, *torch.autograd.grad(y.square().sum() + h.sum(), sources)])
    cuda.check()
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
