"""How the C++ kernel packs, and that it follows values wherever they change."""

import gc
import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch

from fivefold.sparse_rnn import SparseLSTM
from fivefold.sparse_rnn.ops.recurrence import cpu, recurrence


def _balanced(hidden: int) -> SparseLSTM:
    layer = SparseLSTM(4, hidden, density=0.0)
    mask = torch.rand(4 * hidden, hidden // 32, 32).argsort(-1) < 3
    layer.set_weight("weight_hh_l0", torch.randn(4 * hidden, hidden), mask.view(-1, hidden))
    return layer


def _padding(layer: SparseLSTM, batch: int) -> float:
    layer(torch.randn(2, batch, 4))
    _, col = layer.pattern_of("weight_hh_l0")
    packed = cpu._packed[col][
        cpu.choose(layer.weight_hh_l0, layer.hidden_size, batch, transposed=False)
    ]
    return packed.num_entries / layer.weight_hh_l0.numel()


def test_balanced_rows_are_packed_without_padding() -> None:
    assert _padding(_balanced(128), 1) == 1.0


@pytest.mark.parametrize(("density", "most"), [(0.1, 1.9), (0.3, 1.15)])
def test_random_rows_are_packed_with_little(density: float, most: float) -> None:
    if cpu.tiles_are_there():
        assert _padding(SparseLSTM(4, 512, density=density), 1) < most


def test_many_sequences_read_rows_as_they_are() -> None:
    values = torch.randn(3)
    assert cpu.choose(values, 64, 8, transposed=False).kind == cpu.Kind.ROWS
    assert cpu.choose(values, 64, 7, transposed=False).kind != cpu.Kind.ROWS
    assert cpu.choose(values.double(), 64, 1, transposed=True).kind == cpu.Kind.GATHER


def test_what_is_packed_goes_with_the_pattern() -> None:
    layer = _balanced(32)
    layer(torch.randn(2, 1, 4))
    before = len(cpu._packed)
    del layer
    gc.collect()
    assert len(cpu._packed) < before


def test_any_change_of_one_value_is_seen() -> None:
    layer = SparseLSTM(4, 64, density=0.3)
    x = torch.randn(2, 1, 4)
    before = layer(x)[0].detach()
    values = layer.weight_hh_l0.data
    for at in (0, 1, 17, values.numel() // 2, values.numel() - 1):
        old = values[at].item()
        values[at] = old + 4.0
        assert not torch.equal(layer(x)[0], before)
        values[at] = old
        assert torch.equal(layer(x)[0], before)


def test_two_layers_may_have_one_pattern() -> None:
    one = SparseLSTM(4, 32, density=0.3)
    crow, col = one.pattern_of("weight_hh_l0")
    gates, h, c = torch.randn(3, 1, 128), torch.zeros(1, 32), torch.zeros(1, 32)
    values = [torch.randn(col.shape) for _ in range(2)]
    for each in (*values, *values):
        options: dict[str, Any] = {"cell": "lstm"}
        found = recurrence(gates, h, c, each, crow, col, **options, backend="cpu")
        expected = recurrence(gates, h, c, each, crow, col, **options, backend="reference")
        torch.testing.assert_close(found, expected)


def test_threads_of_python_may_call_at_once() -> None:
    layer = SparseLSTM(4, 96, density=0.2)
    x = torch.randn(20, 2, 4)
    torch.set_num_threads(2)
    with torch.no_grad():
        expected = layer(x)[0]
        found: list[torch.Tensor] = []
        threads = [threading.Thread(target=lambda: found.append(layer(x)[0])) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 4 and all(torch.equal(each, expected) for each in found)


def test_nan_and_infinity_end_and_stay() -> None:
    layer = SparseLSTM(4, 40, density=0.5)
    for value in (torch.nan, torch.inf):
        x = torch.randn(4, 1, 4)
        x[1, 0, 0] = value
        y = layer(x)[0]
        assert y[0].isfinite().all()
        assert y[2].isnan().any() == layer.to_dense()(x)[0][2].isnan().any()


def test_other_cpus_get_the_same_values(tmp_path: Any) -> None:
    program = """
import torch
from fivefold.sparse_rnn import SparseGRU
from fivefold.sparse_rnn.ops.recurrence import cpu
torch.manual_seed(0)
torch.set_num_threads(2)
assert not cpu.tiles_are_there()
for dtype in (torch.float64, torch.float32):
    for batch in (1, 3, 9):
        layer = SparseGRU(4, 45, density=0.3, dtype=dtype)
        dense, x = layer.to_dense(), torch.randn(5, batch, 4, dtype=dtype)
        layer.backend = "cpu"
        torch.testing.assert_close(layer(x)[0], dense(x)[0])
        gradients = [
            torch.autograd.grad(each(x)[0].square().sum(), [each.weight_ih_l0, each.bias_hh_l0])
            for each in (layer, dense)
        ]
        torch.testing.assert_close(*gradients)
"""
    environment = os.environ | {"CXX": "g++ -mno-avx512f", "FIVEFOLD_CACHE_DIR": str(tmp_path)}
    # What the compiler is told first it is also told last: flags of its command come before ours.
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
