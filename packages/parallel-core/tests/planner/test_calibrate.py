"""Constants of the machine at hand: what is made of times, and the command that takes them."""

from pathlib import Path

import pytest

from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.planner.calibrate import (
    SUMS,
    WIDTH,
    calibrate,
    fit_line,
    fit_link,
    write_hardware,
)
from fivefold.parallel_core.planner.cli import main
from fivefold.parallel_core.planner.hardware import Hardware, hardware
from fivefold.parallel_core.planner.kernels import Gemm, gemm_seconds
from fivefold.parallel_core.planner.links import Reach, seconds


def machine(**changes: float) -> Hardware:
    base = {"name": "here", "memory": 2**34, "flops": 3e11, "bandwidth": 1e13, "num_cores": 1}
    links = {"node_bandwidth": 2e9, "network_bandwidth": 2e9, "node_latency": 5e-5}
    shares = {"efficiency": 1.0, "bandwidth_efficiency": 1.0, "link_efficiency": 1.0}
    return Hardware.from_dict(base | links | shares | {"half_size": 96.0} | changes)


def test_times_of_products_give_back_peak_and_half_size() -> None:
    known = machine()
    times = [(k, gemm_seconds(known, Gemm(WIDTH, WIDTH, k), 2)) for k in SUMS]
    assert fit_line(times) == pytest.approx((known.flops, known.half_size), rel=1e-9)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_times_of_messages_give_back_the_link(num_ranks: int) -> None:
    known, share = machine(), (num_ranks - 1) / num_ranks
    sizes = (1 << 10, 1 << 22)
    reach = Reach(num_ranks, num_ranks)
    times = [(n, seconds(known, "all_gather", reach, 1, share * n)) for n in sizes]
    expected = (known.node_latency, known.node_bandwidth)
    assert fit_link(times, num_ranks) == pytest.approx(expected, rel=1e-9)


def test_noise_gives_no_impossible_machine() -> None:
    flops, half = fit_line([(64, 2.0), (256, 2.0), (1024, 2.0)])
    assert flops > 0 and half >= 0
    latency, bandwidth = fit_link([(1 << 10, 1e-3), (1 << 22, 1e-3)], 2)
    assert latency > 0 and bandwidth > 0


def test_a_written_machine_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "here.toml"
    write_hardware(path, machine())
    assert hardware(str(path)) == machine()


def test_the_command_measures_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "desk.toml"
    assert main(["calibrate", str(path), "--repeats", "1"]) == 0
    found = hardware(str(path))
    assert capsys.readouterr().out == path.read_text()
    assert (found.name, found.node_size) == ("desk", 2)
    assert found.flops > 0 and found.bandwidth > 0 and found.node_bandwidth > 0


def test_nothing_to_measure_with() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        calibrate("none", num_ranks=0)
