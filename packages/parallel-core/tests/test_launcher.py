"""Forked ranks: results, every way to fail, signals, and nothing left behind."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fivefold.parallel_core.errors import ConfigError, FollowUpError, ParallelError, RankError
from fivefold.parallel_core.launcher import connect, disconnect, launch, rejoin, under_torchrun
from fivefold.parallel_core.launcher import rank as rank_module

LONG = 120.0  # seconds; no test waits that long, it only ends one that hangs


@dataclass
class Report:
    rank: int
    values: Tensor


def _sum_of_ranks() -> float:
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total)
    return total.item()


def _wait_for_peers() -> None:
    """Sit in collectives until a peer goes away."""
    while True:
        dist.all_reduce(torch.ones(10))
        time.sleep(0.01)


def _until(condition: Callable[[], bool], seconds: float = LONG / 2) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def _runs(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state not in "ZX"


def _children() -> set[int]:
    """This process's children, zombies too; other tests may keep some, such as data workers."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # gone by now
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(stat.parent.name))
    return found


def _failure(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = LONG) -> str:
    with pytest.raises(RankError) as caught:
        launch(fn, world_size, *args, timeout=timeout)
    return str(caught.value)


class TestResults:
    def test_come_in_rank_order(self) -> None:
        def work(factor: int) -> Report:
            time.sleep(0.03 * (3 - dist.get_rank()))
            return Report(dist.get_rank(), torch.full((2,), float(factor * dist.get_rank())))

        reports = launch(work, 4, 10, timeout=LONG)
        assert [r.rank for r in reports] == [0, 1, 2, 3]
        assert [r.values.tolist() for r in reports] == [[0, 0], [10, 10], [20, 20], [30, 30]]

    def test_may_be_large(self) -> None:
        numel = 5_000_000  # 20 MB in float32

        def work() -> dict[str, Any]:
            return {"x": torch.arange(numel, dtype=torch.float32) + dist.get_rank(), "n": None}

        for rank, result in enumerate(launch(work, 3, timeout=LONG)):
            assert result["n"] is None
            assert torch.equal(result["x"], torch.arange(numel, dtype=torch.float32) + rank)

    def test_one_rank_is_a_job(self) -> None:
        assert launch(_sum_of_ranks, 1, timeout=LONG) == [0.0]

    def test_ranks_share_a_group(self) -> None:
        assert launch(_sum_of_ranks, 4, timeout=LONG) == [6.0] * 4

    def test_a_rank_may_be_far_ahead(self) -> None:
        def work() -> int:
            dist.new_group(list(range(4)))
            if dist.get_rank() == 3:
                time.sleep(0.5)
            return dist.get_rank()

        assert launch(work, 4, timeout=LONG) == [0, 1, 2, 3]

    def test_after_the_parent_ran_backward(self) -> None:
        def gradient(size: int) -> Tensor:
            weight = torch.linspace(-1, 1, size * size, dtype=torch.float64).view(size, size)
            weight.requires_grad_()
            return torch.autograd.grad((weight @ weight).relu().sum(), weight)[0]

        expected = gradient(300)  # large enough for several threads, where there are any
        for result in launch(gradient, 2, 300, timeout=LONG):
            assert torch.allclose(result, expected, rtol=1e-12, atol=1e-9)

    def test_without_a_group(self) -> None:
        def work() -> tuple[bool, tuple[int, int]]:
            return dist.is_initialized(), connect()

        assert launch(work, 2, init=False, timeout=LONG) == [(False, (0, 2)), (False, (1, 2))]

    def test_a_rank_may_launch_ranks(self) -> None:
        def work() -> list[float]:
            return launch(_sum_of_ranks, 2, timeout=LONG)

        assert launch(work, 2, init=False, timeout=LONG) == [[1.0, 1.0]] * 2

    def test_from_another_thread(self) -> None:
        results: list[float] = []
        before = signal.getsignal(signal.SIGINT)
        thread = threading.Thread(
            target=lambda: results.extend(launch(_sum_of_ranks, 2, timeout=LONG))
        )
        thread.start()
        thread.join(LONG)
        assert results == [1.0, 1.0]
        assert signal.getsignal(signal.SIGINT) is before


class TestRank:
    def test_has_one_thread_or_as_many_as_asked(self) -> None:
        assert launch(torch.get_num_threads, 2, timeout=LONG) == [1, 1]
        assert launch(torch.get_num_threads, 1, threads_per_rank=3, timeout=LONG) == [3]

    def test_finds_gloo_on_the_loopback(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def interface() -> str | None:
            return os.environ.get("GLOO_SOCKET_IFNAME")

        monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
        assert launch(interface, 1, init=False, timeout=LONG) == ["lo"]
        assert "GLOO_SOCKET_IFNAME" not in os.environ
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
        assert launch(interface, 1, init=False, timeout=LONG) == ["eth7"]

    def test_writes_whole_lines(self, capfd: pytest.CaptureFixture[str]) -> None:
        def work() -> None:
            for line in range(20):
                print(f"rank {dist.get_rank()} line {line} " + "x" * 50)
            print("to stderr", file=sys.stderr)

        launch(work, 3, timeout=LONG)
        out, err = capfd.readouterr()
        expected = {f"rank {r} line {i} " + "x" * 50 for r in range(3) for i in range(20)}
        assert sorted(out.splitlines()) == sorted(expected)
        assert err.splitlines() == ["to stderr"] * 3


class TestFailure:
    def test_shows_the_traceback(self) -> None:
        def no_such_thing() -> None:
            if dist.get_rank() == 2:
                raise ValueError("no such thing: 42")
            _wait_for_peers()

        message = _failure(no_such_thing, 4)
        first, second, *_ = message.splitlines()
        assert first == "rank 2 of 4 failed: ValueError: no such thing: 42"
        assert second == "Traceback (most recent call last):"
        assert "in no_such_thing" in message
        assert "run_rank" not in message
        assert message.endswith("ValueError: no such thing: 42")

    def test_first_of_two_is_told(self) -> None:
        def work() -> None:
            time.sleep(0.1 * (2 - connect()[0]))
            raise ValueError(f"number {connect()[0]}")

        assert _failure(work, 2).startswith("rank 1 of 2 failed: ValueError: number 1\n")

    def test_lost_connections_do_not_hide_the_cause(self) -> None:
        def work() -> None:
            if dist.get_rank() == 1:
                dist.barrier()
                disconnect()
                time.sleep(0.5)  # the others notice long before this one raises
                raise ValueError("the cause")
            dist.barrier()
            try:
                _wait_for_peers()
            except RuntimeError as error:
                raise KeyError("a wrapper") from error

        assert _failure(work, 3).startswith("rank 1 of 3 failed: ValueError: the cause\n")

    def test_a_rank_that_points_to_another_waits_for_it(self) -> None:
        def work() -> None:
            if dist.get_rank() == 2:
                time.sleep(3)  # longer than what nobody explains is waited for
                raise ValueError("the cause")
            raise FollowUpError("rank 2 says why", cause=2)

        assert _failure(work, 3).startswith("rank 2 of 3 failed: ValueError: the cause\n")

    def test_a_rank_that_points_to_one_that_is_gone_is_heard(self) -> None:
        def work() -> None:
            if dist.get_rank() == 0:
                raise FollowUpError("rank 1 says why", cause=1)

        assert _failure(work, 2).startswith("rank 0 of 2 failed: ")

    def test_left_out_collective_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def work() -> None:
            if dist.get_rank() != 1:
                dist.barrier()

        monkeypatch.setattr(rank_module, "_LINGER", 0.2)
        message = _failure(work, 3)
        assert "gloo" in message
        assert "(ranks [1] had returned before; did they skip a collective?)" in message

    def test_killed_rank_ends_the_rest_soon(self, tmp_path: Path) -> None:
        def work() -> None:
            (tmp_path / str(dist.get_rank())).write_text(str(os.getpid()))
            dist.barrier()
            if dist.get_rank() == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            dist.all_reduce(torch.ones(100_000))

        start = time.monotonic()
        message = _failure(work, 8)
        assert time.monotonic() - start < 5
        assert message.startswith("rank 3 of 8 was killed by signal 9 (SIGKILL)")
        assert not any(_runs(int(file.read_text())) for file in tmp_path.iterdir())

    def test_rank_that_ignores_sigterm_is_killed(self) -> None:
        def work() -> None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            dist.barrier()
            if dist.get_rank() == 0:
                raise ValueError("over")
            time.sleep(LONG)

        start = time.monotonic()
        assert _failure(work, 2).startswith("rank 0 of 2 failed: ValueError: over\n")
        assert time.monotonic() - start < 5

    @pytest.mark.parametrize("status", [0, 7])
    def test_exit_without_result(self, status: int) -> None:
        def work() -> None:
            if dist.get_rank() == 0:
                os._exit(status)
            _wait_for_peers()

        expected = f"rank 0 of 2 exited with status {status} without returning a result"
        assert _failure(work, 2) == expected

    @pytest.mark.parametrize(
        ("error", "what"),
        [(SystemExit(0), "SystemExit: 0"), (KeyboardInterrupt(), "KeyboardInterrupt")],
    )
    def test_exits_are_failures(self, error: BaseException, what: str) -> None:
        def work() -> NoReturn:
            raise error

        assert _failure(work, 1).startswith(f"rank 0 of 1 failed: {what}\n")

    def test_crash_shows_the_stack(self) -> None:
        def reads_address_zero() -> None:
            ctypes.string_at(0)

        message = _failure(reads_address_zero, 1)
        assert message.startswith("rank 0 of 1 was killed by signal 11 (SIGSEGV)\n")
        assert "in reads_address_zero" in message
        assert "in launch" not in message

    def test_result_that_does_not_pickle(self) -> None:
        message = _failure(lambda: threading.Lock(), 1)
        assert message.startswith("rank 0 of 1 failed: TypeError: cannot pickle")
        assert "What fn returns must pickle" in message

    def test_result_that_does_not_unpickle(self) -> None:
        assert _failure(_Unreadable, 1).startswith("rank 0 of 1: its result does not unpickle: ")

    def test_timeout_shows_stacks_of_running_ranks(self) -> None:
        def sleeps_forever() -> None:
            if dist.get_rank() > 0:
                time.sleep(LONG)

        start = time.monotonic()
        message = _failure(sleeps_forever, 3, timeout=1.0)
        assert time.monotonic() - start < 5
        head, _, stacks = message.partition("\n")
        assert head == "rank 1 of 3, rank 2 of 3 still ran after the timeout of 1.0 s"
        assert stacks.count("in sleeps_forever") == 2
        assert "--- rank 1 of 3\n" in stacks and "--- rank 2 of 3\n" in stacks
        assert "in launch" not in stacks


class _Unreadable:
    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("not a number",)


class TestArguments:
    @pytest.mark.parametrize("world_size", [0, -2])
    def test_needs_a_rank(self, world_size: int) -> None:
        with pytest.raises(ConfigError, match=f"world_size={world_size}.*at least 1"):
            launch(_sum_of_ranks, world_size)

    @pytest.mark.parametrize("name", ["timeout", "collective_timeout", "threads_per_rank"])
    def test_numbers_are_positive(self, name: str) -> None:
        options: dict[str, Any] = {name: 0}
        with pytest.raises(ConfigError, match=f"{name}=0"):
            launch(_sum_of_ranks, 1, **options)

    def test_needs_fork(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
        with pytest.raises(ParallelError, match=r"by fork.*4 ranks with torchrun"):
            launch(_sum_of_ranks, 4)

    def test_needs_a_parent_without_group(self) -> None:
        def work() -> str:
            with pytest.raises(ParallelError) as caught:
                launch(_sum_of_ranks, 4)
            return str(caught.value)

        for message in launch(work, 2, timeout=LONG):
            assert "process group of 4" in message and "in one of 2 already" in message


@contextlib.contextmanager
def _parent(body: Callable[[], object]) -> Iterator[tuple[int, Callable[[], str]]]:
    """A process that runs ``body`` in a session of its own: its pid, and what became of it."""
    receive, send = multiprocessing.Pipe(duplex=False)

    def main() -> None:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            send.send(repr(body()))
        except BaseException as error:
            send.send(repr(error))

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    assert process.pid is not None
    try:
        yield process.pid, lambda: receive.recv() if receive.poll(LONG / 2) else "silence"
    finally:
        process.kill()
        process.join()
        receive.close()
        send.close()


def _ready(folder: Path, ranks: int) -> bool:
    return _until(lambda: len(list(folder.iterdir())) == ranks)


def _steps(folder: Path) -> int:
    """A training loop that ends well when asked to stop; returns what it was asked by."""
    stops: list[int] = []
    signal.signal(signal.SIGTERM, lambda signum, frame: stops.append(signum))
    (folder / str(dist.get_rank())).write_text(str(os.getpid()))
    stop = torch.zeros(1)
    while not stop:
        stop[0] = len(stops)
        dist.all_reduce(stop)
        time.sleep(0.01)
    time.sleep(0.5)  # save
    return stops[0] if len(stops) == 1 else -1


def _deaf(folder: Path) -> None:
    signal.signal(signal.SIGTERM, lambda signum, frame: None)
    (folder / str(dist.get_rank())).write_text(str(os.getpid()))
    while True:
        time.sleep(0.1)


def _kill_ranks(folder: Path) -> None:
    """Kill the ranks that wrote their pids into ``folder`` and still run."""
    for file in folder.iterdir():
        text = file.read_text()
        if text and _runs(int(text)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(text), signal.SIGKILL)


def _plain(folder: Path) -> None:
    (folder / str(dist.get_rank())).write_text(str(os.getpid()))
    _wait_for_peers()


SCRIPT = """
import pathlib, sys, signal
sys.path.insert(0, {tests!r})
from test_launcher import _steps, launch
print(launch(_steps, 2, pathlib.Path({folder!r}), timeout=60, on_interrupt=print))
"""


class TestSignals:
    def test_ctrl_c_lets_a_run_end_well(self, tmp_path: Path) -> None:
        script = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
        command = [sys.executable, "-c", script]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            assert _ready(tmp_path, 2)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all at once
            time.sleep(0.1)
            os.kill(process.pid, signal.SIGINT)  # as a wrapper does on top
            out, _ = process.communicate(timeout=LONG)
        assert process.returncode == 0
        assert out.splitlines() == ["2", "[15, 15]"]

    def test_sigterm_too(self, tmp_path: Path) -> None:
        with _parent(lambda: launch(_steps, 2, tmp_path)) as (pid, outcome):
            assert _ready(tmp_path, 2)
            os.kill(pid, signal.SIGTERM)
            assert outcome() == "[15, 15]"

    @pytest.mark.parametrize(
        ("signum", "error"),
        [(signal.SIGINT, "KeyboardInterrupt()"), (signal.SIGTERM, "SystemExit(143)")],
    )
    def test_ranks_without_handler_end(self, signum: int, error: str, tmp_path: Path) -> None:
        with _parent(lambda: launch(_plain, 2, tmp_path)) as (pid, outcome):
            assert _ready(tmp_path, 2)
            os.killpg(pid, signum)
            assert outcome() == error

    def test_second_ctrl_c_kills(self, tmp_path: Path) -> None:
        with _parent(lambda: launch(_deaf, 2, tmp_path)) as (pid, outcome):
            assert _ready(tmp_path, 2)
            os.killpg(pid, signal.SIGINT)
            time.sleep(0.5)
            pids = [int(file.read_text()) for file in tmp_path.iterdir()]
            assert all(_runs(p) for p in pids)
            start = time.monotonic()
            os.killpg(pid, signal.SIGINT)
            assert outcome() == "KeyboardInterrupt()"
            assert time.monotonic() - start < 2
            assert not any(_runs(p) for p in pids)

    def test_sigterm_to_one_rank_is_a_failure(self) -> None:
        def work() -> None:
            if dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            _wait_for_peers()

        assert _failure(work, 2) == "rank 1 of 2 was killed by signal 15 (SIGTERM)"

    def test_handlers_come_back(self) -> None:
        before = signal.signal(signal.SIGTERM, handler := lambda signum, frame: None)
        try:
            launch(_sum_of_ranks, 1, timeout=LONG)
            assert signal.getsignal(signal.SIGTERM) is handler
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
            _failure(lambda: 1 / 0, 1)
            assert signal.getsignal(signal.SIGTERM) is handler
        finally:
            signal.signal(signal.SIGTERM, before)


class TestNothingIsLeft:
    def test_when_the_parent_is_killed(
        self, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Its folder stays: nobody is left who could remove it.
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))
        tmp_path = tmp_path_factory.mktemp("pids")
        with _parent(lambda: launch(_deaf, 3, tmp_path)) as (pid, _):
            try:
                assert _ready(tmp_path, 3)
                pids = [int(file.read_text()) for file in tmp_path.iterdir()]
                assert all(_runs(p) for p in pids)
                os.kill(pid, signal.SIGKILL)
                assert _until(lambda: not any(_runs(p) for p in pids), seconds=5)
            finally:
                _kill_ranks(tmp_path)  # they are deaf and, without their parent, nobody's

    def test_after_several_launches(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        launch(_sum_of_ranks, 2, timeout=LONG)
        files, children = sorted(os.listdir("/dev/fd")), _children()
        for _ in range(5):
            launch(_sum_of_ranks, 2, timeout=LONG)
        _failure(lambda: os._exit(3), 2)
        _failure(time.sleep, 1, LONG, timeout=0.2)
        assert sorted(os.listdir("/dev/fd")) == files
        assert list(tmp_path.iterdir()) == []
        assert _children() == children


class TestRejoin:
    def test_gives_the_same_ranks_and_no_thread_of_groups_before(self) -> None:
        def job() -> tuple[list[float], list[int]]:
            sums, threads = [], []
            for number in range(3):
                rejoin()
                group = dist.new_group(
                    [dist.get_rank() // 2 * 2, dist.get_rank() // 2 * 2 + 1],
                    use_local_synchronization=True,
                )
                total = torch.tensor(float(dist.get_rank() + number))
                dist.all_reduce(total, group=group)
                sums.append(total.item() + _sum_of_ranks())
                threads.append(len(os.listdir("/proc/self/task")))
                del group
            return sums, threads

        for rank, (sums, threads) in enumerate(launch(job, 4, timeout=LONG)):
            pair = 4.0 * (rank // 2) + 1
            assert sums == [pair + 6, pair + 8, pair + 10]
            assert threads[2] <= threads[0], threads

    def test_waits_for_a_late_rank(self) -> None:
        def job() -> float:
            if dist.get_rank() == 1:
                time.sleep(0.5)
            rejoin()
            return _sum_of_ranks()

        assert launch(job, 3, timeout=LONG) == [3.0] * 3

    @pytest.mark.parametrize("init", [True, False])
    def test_is_for_ranks_that_have_joined(self, init: bool) -> None:
        with pytest.raises(ParallelError, match="for the ranks of launch"):
            rejoin()
        if not init:
            with pytest.raises(RankError, match="for the ranks of launch"):
                launch(rejoin, 1, init=False, timeout=LONG)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class TestConnect:
    def test_outside_of_any_job(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        assert not under_torchrun()
        assert connect() == (0, 1)
        disconnect()

    def test_in_a_launched_rank(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.setenv(name, "5")

        def work() -> tuple[bool, tuple[int, int]]:
            return under_torchrun(), connect()

        assert under_torchrun()
        assert launch(work, 2, timeout=LONG) == [(False, (0, 2)), (False, (1, 2))]

    def test_joins_what_torchrun_started(self) -> None:
        def work(port: int) -> tuple[tuple[int, int], float, bool]:
            rank, world_size = connect()
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            assert under_torchrun()
            place = connect(device_type="cpu")
            assert place == connect()
            total = _sum_of_ranks()
            dist.barrier()
            disconnect()
            return place, total, dist.is_initialized()

        results = launch(work, 2, _free_port(), init=False, timeout=LONG)
        assert results == [((0, 2), 1.0, False), ((1, 2), 1.0, False)]

    def test_needs_all_or_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(ConfigError, match=r"\['RANK'\] set.*\['WORLD_SIZE', 'LOCAL_RANK'\]"):
            connect()

    def test_needs_a_gpu_per_rank(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        with pytest.raises(ConfigError, match="LOCAL_RANK=3, but this machine has 2 GPUs"):
            connect(device_type="cuda")

    def test_knows_two_kinds_of_device(self) -> None:
        with pytest.raises(ConfigError, match="device_type='tpu'"):
            connect(device_type="tpu")
