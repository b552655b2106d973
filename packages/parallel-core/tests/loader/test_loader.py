"""Workers that are slow, fail, die or lose their parent; what is slow is held by a pipe."""

import multiprocessing
import os
import select
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fivefold.parallel_core.errors import ConfigError, LoaderError
from fivefold.parallel_core.loader import ReadyFirstLoader


class Made:
    """A dataset by a function."""

    def __init__(self, make: Callable[[Any], Any]):
        self.make = make

    def __getitem__(self, key: Any) -> Any:
        return self.make(key)


class Gate:
    """Samples wait here until somebody lets one through."""

    def __init__(self) -> None:
        self.listen, self.tell = os.pipe()

    def wait(self) -> None:
        os.read(self.listen, 1)

    def open(self) -> None:
        os.write(self.tell, b"x")


def held_first(gate: Gate) -> Made:
    """Sample 0 waits at the gate."""

    def make(key: int) -> int:
        if key == 0:
            gate.wait()
        return 10 * key

    return Made(make)


def once(path: Path) -> bool:
    """Whether this is the first call, in whatever process."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def test_a_slow_sample_holds_up_no_other_and_comes() -> None:
    gate = Gate()
    with ReadyFirstLoader(held_first(gate), 12, num_workers=2, ahead=4, window=12) as loader:
        found = [next(loader) for _ in range(11)]
        assert [each.ordinal for each in found] == list(range(1, 12))
        gate.open()
        last = next(loader)
        assert (last.ordinal, last.value) == (0, 0)
        assert [each.value for each in found] == [10 * n for n in range(1, 12)]
        with pytest.raises(StopIteration):
            next(loader)


def test_in_order_waits_for_it() -> None:
    gate = Gate()

    def make(key: int) -> int:
        if key == 0:
            gate.wait()
        if key == 3:
            gate.open()
        return key

    loader = ReadyFirstLoader(Made(make), 9, num_workers=2, in_order=True)
    assert [each.ordinal for each in loader] == list(range(9))


def test_a_stream_that_goes_on_misses_and_repeats_nothing() -> None:
    gate = Gate()
    with ReadyFirstLoader(held_first(gate), 20, num_workers=2) as loader:
        before = [next(loader).ordinal for _ in range(7)]
        state = loader.state_dict()
    assert state == {"lowest": 0, "delivered": [1, 2, 3, 4, 5, 6, 7]}
    gate.open()
    again = ReadyFirstLoader(held_first(gate), 20, num_workers=3)
    again.load_state_dict(state)
    assert sorted(before + [each.ordinal for each in again]) == list(range(20))


def test_values_arrive_whole_and_writable() -> None:
    given = {
        "bf16": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).t(),
        "bool": torch.tensor(True),
        "empty": torch.zeros(0, 3),
        "array": np.arange(200_000.0),
        "text": "1ubq_A",
    }
    (found,) = [each.value for each in ReadyFirstLoader(Made(lambda _: given), 1, num_workers=1)]
    assert found.keys() == given.keys() and found["text"] == "1ubq_A"
    assert np.array_equal(found["array"], given["array"])
    for name in ("bf16", "bool", "empty"):
        assert torch.equal(found[name], given[name]) and found[name].dtype == given[name].dtype
    found["bf16"].add_(1)
    found["array"] += 1


def test_keys_and_names_are_the_callers() -> None:
    loader = ReadyFirstLoader(
        {"a": 1, "b": 2}, 4, key_of=lambda ordinal: "ab"[ordinal % 2], num_workers=1
    )
    assert [each.value for each in loader] == [1, 2, 1, 2]


def test_an_error_is_raised_by_the_samples_name_though_others_are_slow() -> None:
    gate = Gate()

    def make(key: int) -> int:
        if key == 0:
            gate.wait()  # for ever
        raise ValueError("no alpha carbon")

    loader = ReadyFirstLoader(Made(make), 9, num_workers=2, name_of=lambda n: f"chain {n}")
    with pytest.raises(LoaderError, match=r"sample chain 1 \(number 1\).*\n?.*no alpha carbon"):
        next(loader)
    with pytest.raises(LoaderError, match="no alpha carbon"):
        next(loader)
    loader.close()


def test_what_cannot_be_sent_is_an_error_too() -> None:
    with (
        ReadyFirstLoader(Made(lambda key: lambda: key), 1, num_workers=1) as loader,
        pytest.raises(LoaderError, match=r"sample 0 .*pickle"),
    ):
        next(loader)


def test_a_killed_worker_is_replaced_and_its_sample_made_again(tmp_path: Path) -> None:
    def make(key: int) -> int:
        if key == 4 and once(tmp_path / "killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        return key

    loader = ReadyFirstLoader(Made(make), 12, num_workers=2)
    assert sorted(each.value for each in loader) == list(range(12))
    assert (tmp_path / "killed").exists()


def test_a_sample_that_kills_workers_ends_the_run_by_name() -> None:
    def make(key: int) -> int:
        if key == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return key

    with (
        ReadyFirstLoader(Made(make), 3, num_workers=2, most_deaths=2) as loader,
        pytest.raises(LoaderError, match=r"sample 2 .number 2.: 2 workers died.*signal 9"),
    ):
        list(loader)


def test_workers_end_with_the_loader_and_with_its_process() -> None:
    alive, held = os.pipe()  # at its end once every process that has ``held`` is gone

    def train() -> None:
        gate = Gate()
        loader = ReadyFirstLoader(held_first(gate), None, num_workers=2)
        next(loader)
        os.write(held, b"x")
        gate.wait()

    process = multiprocessing.get_context("fork").Process(target=train)
    process.start()
    os.close(held)
    assert os.read(alive, 1) == b"x"
    process.kill()
    process.join()
    assert select.select([alive], [], [], 120)[0] and os.read(alive, 1) == b""
    os.close(alive)


def test_waiting_is_counted_and_told_once() -> None:
    with ReadyFirstLoader(Made(lambda key: key), 2, num_workers=1) as loader:
        next(loader)
        assert loader.take_waited() > 0 and loader.take_waited() == 0


def test_a_closed_loader_and_sizes_that_cannot_be_are_named() -> None:
    loader = ReadyFirstLoader(Made(lambda key: key), 5, num_workers=1)
    next(loader)
    loader.close()
    loader.close()
    with pytest.raises(LoaderError, match="was closed"):
        next(loader)
    with pytest.raises(ConfigError, match="num_workers=0"):
        ReadyFirstLoader(Made(lambda key: key), 5, num_workers=0)
