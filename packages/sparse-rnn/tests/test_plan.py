"""What a plan says of layers and GPUs, and that it is what runs."""

import pytest
import torch

from fivefold.sparse_rnn import SparseLSTM, SparseRNNInputError
from fivefold.sparse_rnn.plan import DEVICES, Device, plan


def test_the_paper_s_size_is_in_registers() -> None:
    found = plan("rnn_tanh", 2304, density=0.3, batch=4, values="float16")
    assert found.fits and found.path == "cuda, nonzeros in registers"
    assert found.num_blocks == 128 and found.kernel.most_units == 18
    # 18 rows of 22 slots on 8 warps.
    assert 18 * 21 / 8 < found.kernel.pairs <= 18 * 22 / 8 * 1.15
    assert 1.0 < found.conflicts < 1.25
    # Of 1.59 M nonzeros 8 are read in a clock by each of 132 multiprocessors.
    assert found.floor_seconds == pytest.approx(2304**2 * 0.3 / 8 / 132 / 1.755e9, rel=0.05)
    assert found.floor_seconds < found.step_seconds < 4 * found.floor_seconds


def test_an_lstm_of_the_paper_s_size_spills_over_into_shared_memory() -> None:
    found = plan("lstm", 2304, density=0.3, batch=4, values="bfloat16")
    assert found.path == "cuda, nonzeros in registers and shared memory"
    assert found.kernel.register_pairs == 192 and 192 < found.kernel.pairs < 220
    assert found.padding < 1.06
    shown = str(found)
    assert "192 a thread in registers" in shown and "us predicted" in shown


def test_wide_values_of_that_size_have_no_room_and_the_numbers_say_why() -> None:
    found = plan("lstm", 2304, density=0.4, batch=4)
    assert not found.fits and found.path == "triton, a launch for each step"
    assert found.refusal is not None
    assert f"needs {found.shared_bytes} bytes of shared memory" in found.refusal
    assert "device has 232448" in found.refusal and "which hold 96 of 8 bytes" in found.refusal
    assert found.refusal in str(found)


def test_five_times_what_dense_layers_have_room_for() -> None:
    """Dense, 2304 units in float16 take 42 MB; here 5120 units, 210 MB dense, have room."""
    assert plan("lstm", 5120, density=0.1, batch=4, values="float16").fits
    assert not plan("lstm", 5120, density=0.1, batch=4, values="float16", device="a100").fits


@pytest.mark.parametrize(("batch", "width"), [(1, 1), (2, 2), (3, 4), (4, 4), (17, 4), (32, 4)])
def test_sequences_lie_side_by_side(batch: int, width: int) -> None:
    found = plan("gru", 256, density=0.1, batch=batch)
    assert found.fits and found.kernel.width == width
    assert found.kernel.num_groups(batch) == -(-batch // width)


def test_a_large_vector_lies_less_wide() -> None:
    forward = plan("lstm", 4096, density=0.05, batch=4, values="float16")
    backward = plan("lstm", 4096, density=0.05, batch=4, values="float16", backward=True)
    assert forward.kernel.width == 4 and backward.kernel.width == 2
    assert backward.broadcast_seconds == pytest.approx(4 * forward.broadcast_seconds, rel=0.01)


def test_a_pattern_is_planned_as_it_is() -> None:
    layer = SparseLSTM(4, 96, density=0.2)
    pattern = layer.pattern_of("weight_hh_l0")
    for backward in (False, True):
        found = plan("lstm", 96, nonzeros=pattern, backward=backward)
        assert found.num_nonzeros == layer.weight_hh_l0.numel()
    # All in one row.
    crow = torch.zeros(97, dtype=torch.int32)
    crow[6:] = 96
    uneven = plan("rnn_relu", 96, nonzeros=(crow, torch.arange(96, dtype=torch.int32)))
    assert uneven.fits and uneven.kernel.pairs <= 3


def test_nothing_at_all_is_planned_too() -> None:
    found = plan("gru", 7, density=0.0)
    assert found.fits and found.kernel.pairs == 0 and found.conflicts == 0.0


def test_a_device_may_be_described() -> None:
    small = Device(name="small", num_sms=2, shared_bytes=49152, clock=1e9, l2_bandwidth=1e12)
    assert plan("lstm", 64, density=0.1, device=small).num_blocks <= 2
    assert not plan("lstm", 1024, density=0.1, device=small).fits
    assert {"a100", "h100", "h200", "b200"} == DEVICES.keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs where there is no GPU")
def test_no_gpu_here_is_an_error() -> None:
    with pytest.raises(SparseRNNInputError, match="no GPU here; name one of a100"):
        Device.here()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cell": "mlp"}, "cells are rnn_tanh, rnn_relu, lstm, gru, found 'mlp'"),
        ({"values": "int8"}, "values are float16, bfloat16, float32, found 'int8'"),
        ({"device": "tpu"}, "devices are a100, h100, h200, b200, found 'tpu'"),
        ({"batch": 0}, "batch is 0; it must be at least 1"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"density": 1.5}, "density was asked to be 1.5"),
        ({"density": None}, "give a density or the nonzeros"),
        (
            {"density": None, "nonzeros": (torch.zeros(3, dtype=torch.int32), torch.zeros(0))},
            "lstm of 8 units has 32 rows, so 33 numbers .* found 3",
        ),
    ],
)
def test_what_cannot_be_is_said_with_what_can(arguments: dict[str, object], message: str) -> None:
    usual: dict[str, object] = {"cell": "lstm", "hidden_size": 8, "density": 0.1}
    with pytest.raises(SparseRNNInputError, match=message):
        plan(**(usual | arguments))  # type: ignore[arg-type]
