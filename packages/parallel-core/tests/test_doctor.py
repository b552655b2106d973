"""Healthy collectives are found healthy, and each way to be ill is found and named."""

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fivefold.parallel_core import collectives
from fivefold.parallel_core.cli import main
from fivefold.parallel_core.collective_types import DECLARED
from fivefold.parallel_core.doctor import Options, command, rounds
from fivefold.parallel_core.doctor.examination import shared_groups
from fivefold.parallel_core.doctor.probes import DTYPES, PROBES, Values, difference
from fivefold.parallel_core.doctor.report import Check, Examined, Report, line
from fivefold.parallel_core.doctor.rounds import Verdict
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.topology import AXES, Axis

COLLECTIVES = [*PROBES, "barrier"]
NAMES = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
CHECKS = [(name, dtype) for name in PROBES for dtype in NAMES] + [("barrier", None)]
SICK = 1  # the rank that tests make ill


class Run:
    """One run of the command: its status, its texts and its JSON."""

    def __init__(self, capfd: pytest.CaptureFixture[str], folder: Path, *words: str):
        file = folder / "report.json"
        start = time.monotonic()
        options = ["--bytes", "64", "--repeats", "1", "--timeout", "20", "--json", str(file)]
        self.status = main(["doctor", *options, *words])
        self.seconds = time.monotonic() - start
        self.out, self.error = capfd.readouterr()
        self.json: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def axis(self, name: str) -> dict[str, Any]:
        """What the JSON says of an axis."""
        return next(found for found in self.json["axes"] if name in found["axes"])

    def statuses(self, name: str) -> dict[tuple[str, str | None], str]:
        """Status of each check of an axis."""
        checks = self.axis(name)["checks"]
        return {(check["collective"], check["dtype"]): check["status"] for check in checks}

    def line(self, axis: str, collective: str) -> str:
        """The only line about a collective on an axis, without these two names."""
        (found,) = (
            text.split(maxsplit=2)[2]
            for text in self.out.splitlines()
            if text.startswith("  ") and text.split()[:2] == [axis, collective]
        )
        return found


Runner = Callable[..., Run]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Runner:
    return lambda *words: Run(capfd, tmp_path, *words)


def on_sick_rank(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, do: Any) -> None:
    """Replace a function by ``do(its result, *its arguments)`` on one rank; called there after."""
    healthy = getattr(owner, name)

    def maybe(*args: Any, **options: Any) -> Any:
        if dist.get_rank() == SICK:
            return do(lambda: healthy(*args, **options), *args)
        return healthy(*args, **options)

    monkeypatch.setattr(owner, name, maybe)


# ---- all is well ---------------------------------------------------------------------------


def test_every_axis_and_collective_is_checked(run: Runner) -> None:
    found = run("--nproc", "4", "--tp", "2", "--ep", "4", "--order", "tp-cp-ep-dp-pp")
    assert found.status == 0, found.error
    layout = Layout(4, tp=2, ep=4)
    assert found.out.startswith(layout.explain(4) + "\n")
    assert found.error == ""
    assert found.out.endswith("\nall 75 checks ok\n")
    assert found.json["layout"] == layout.to_dict()
    assert found.json["ok"] and found.json["counts"] == {"ok": 75}
    assert sorted(n for a in found.json["axes"] for n in a["axes"]) == sorted([*AXES, "world"])
    for examined in found.json["axes"]:
        for name in set(examined["axes"]) - {"world"}:
            assert sorted(examined["groups"]) == sorted(layout.groups(name))
        many = examined["size"] > 1
        checks = [(check["collective"], check["dtype"]) for check in examined["checks"]]
        assert checks == (CHECKS if many else [])
        for collective in COLLECTIVES if many else []:
            text = found.line("=".join(examined["axes"]), collective)
            assert re.match(r"ok  min +\d+\.\d{3} ms  median +\d+\.\d{3} ms", text)
            assert ("GB/s" in text) == (collective != "barrier")
    assert "tp=tp-cp: groups of 2, [0 1] [2 3]\n" in found.out
    assert "cp=pp=etp=edp: one rank, sends nothing\n" in found.out


def test_speeds_follow_the_declared_costs(run: Runner) -> None:
    found = run("--tp", "2", "--bytes", "4096", "--repeats", "3")
    assert found.status == 0
    known = {"t": 2, "n": 4096}
    for check in found.axis("tp")["checks"]:
        assert 0 < check["seconds_min"] <= check["seconds_median"]
        formula = DECLARED.get(check["collective"])
        if formula is not None and formula.forward not in ("sent", "0"):
            assert check["bytes_sent"] == eval(formula.forward, {}, known)
    sent = {c["collective"]: c["bytes_sent"] for c in found.axis("tp")["checks"]}
    # Of four rows of pieces, one crosses in an even exchange, and two cross in the uneven one.
    assert (sent["all_to_all"], sent["all_to_all_uneven"]) == (2048, 4096)
    assert (sent["ring_shift"], sent["broadcast"], sent["barrier"]) == (4096, 2048, 0)
    check = next(c for c in found.axis("tp")["checks"] if c["bytes_sent"])
    assert check["bytes_per_second"] == check["bytes_sent"] / check["seconds_median"]


def test_one_rank_sends_nothing(run: Runner) -> None:
    found = run("--nproc", "1")
    assert found.status == 0
    assert found.out.endswith("\none rank sends nothing: nothing to check\n")
    assert [examined["size"] for examined in found.json["axes"]] == [1]


# ---- wrong numbers -------------------------------------------------------------------------


def spoil(x: Tensor) -> Tensor:
    x.view(-1)[-1] += 1
    return x


def test_wrong_numbers_of_each_collective_are_found(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sum_over", "gather_along", "scatter_sum_along", "exchange_rows"):
        on_sick_rank(monkeypatch, collectives, name, lambda call, *args: spoil(call()))

    def late(call: Any, *args: Any) -> Any:
        wait = call()
        return lambda: spoil(wait())

    on_sick_rank(monkeypatch, collectives, "start_shift", late)

    def in_place(call: Any, x: Tensor, *args: Any) -> None:
        call()
        spoil(x)

    on_sick_rank(monkeypatch, dist, "all_reduce", in_place)
    on_sick_rank(monkeypatch, dist, "broadcast", in_place)
    monkeypatch.setattr(dist, "barrier", lambda group: None)
    found = run("--tp", "2", "--pp", "2")
    assert found.status == 1
    assert found.json["ok"] is False
    for axis, ranks in (("tp", "rank 1"), ("pp", "rank 1")):
        assert set(found.statuses(axis).values()) == {"wrong"}
        name = "=".join(found.axis(axis)["axes"])
        for collective in PROBES:
            text = found.line(name, collective)
            assert re.match(rf"WRONG on {ranks} in float32: ", text), text
            assert f"WRONG on {ranks} in int64: " in text
            assert re.search(r"1 of \d+ values differ, the first at \d+: found \d+", text)
        # Whoever comes first to a barrier that lets all through is let through too early.
        assert found.line(name, "barrier").startswith("WRONG on rank")
        for check in found.axis(axis)["checks"][:-1]:
            assert [failure["rank"] for failure in check["failures"]] == [1]
    assert found.error.startswith("fivefold-parallel-core: error: 75 of 75 checks failed: ")
    assert "all_reduce over tp=edp=" in found.error and found.error.count("\n") == 1


def test_groups_that_are_mixed_up_are_found(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over the world where they should be over tp: right in shape, wrong in all values."""
    healthy = collectives.sum_over

    def too_far(x: Tensor, axis: Axis) -> Tensor:
        wide = Axis(axis.name, 4, dist.get_rank(), (0, 1, 2, 3), dist.group.WORLD)
        return healthy(x, wide if axis.name == "tp" else axis)

    monkeypatch.setattr(collectives, "sum_over", too_far)
    found = run("--tp", "2", "--nproc", "4")
    assert found.status == 1
    assert found.json["counts"] == {"ok": 72, "wrong": 3}
    assert found.line("tp=tp-cp", "all_reduce").startswith("WRONG on ranks 0 1 2 3 in float32: ")


# ---- errors --------------------------------------------------------------------------------


def test_an_error_on_one_rank_is_named_and_the_others_do_not_wait_for_ever(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(call: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        if axis.name != "tp":
            return call()
        raise ValueError("the cable is out\nand more")

    on_sick_rank(monkeypatch, collectives, "gather_along", fail)
    found = run("--tp", "2", "--nproc", "4")
    assert found.status == 1
    assert found.seconds < 15  # of a timeout of 20 seconds for each check
    text = found.line("tp=tp-cp", "all_gather")
    assert re.fullmatch(
        r"error on rank 1 in float32: ValueError: the cable is out; rank 0 waited in vain: .+", text
    )
    assert found.line("tp=tp-cp", "broadcast") == "not run: its ranks are out of step"
    assert found.line("tp=tp-cp", "all_reduce").startswith("ok")
    # The other axes are examined all the same.
    assert set(found.statuses("dp").values()) == set(found.statuses("world").values()) == {"ok"}
    assert found.error == (
        "fivefold-parallel-core: error: 1 of 75 checks failed, 18 were not run: "
        "all_gather over tp=tp-cp (error on rank 1)\n"
    )
    (check,) = (c for c in found.axis("tp")["checks"] if c["status"] == "error")
    assert (check["collective"], check["dtype"]) == ("all_gather", "float32")
    assert check["failures"][1] == {
        "rank": 1,
        "status": "error",
        "detail": "ValueError: the cable is out",
    }


def test_what_all_ranks_refuse_leaves_them_in_step(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy = dist.all_to_all_single

    def refuse(out: Tensor, x: Tensor, *args: Any, **options: Any) -> Any:
        if x.dtype == torch.bfloat16:
            raise RuntimeError("no such dtype here")
        return healthy(out, x, *args, **options)

    monkeypatch.setattr(dist, "all_to_all_single", refuse)
    found = run("--cp", "2")
    assert found.status == 1
    assert found.json["counts"] == {"error": 2, "ok": 23}
    expected = "error on ranks 0 1 in bfloat16: RuntimeError: no such dtype here"
    for collective in ("all_to_all", "all_to_all_uneven"):
        assert found.line("=".join(found.axis("cp")["axes"]), collective) == expected


def test_groups_that_cannot_be_made(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(call: Any, *args: Any) -> None:
        raise RuntimeError("no route to host")

    on_sick_rank(monkeypatch, dist, "new_group", fail)
    found = run("--tp", "2", "--nproc", "4")
    assert found.status == 1
    assert "the groups cannot be made: world  new_group" in found.error
    assert "error on rank 1: RuntimeError: no route to host" in found.error
    assert found.error.count("\n") == 1 and "Traceback" not in found.error


def test_the_rank_that_knows_why_is_heard_though_it_is_the_last_to_speak(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 hears everybody first, so the others have ended long before it tells."""

    def fail(call: Any, *args: Any) -> None:
        raise RuntimeError("no route to host")

    def late(healthy: Any, *args: Any) -> Any:
        outcome = healthy(*args)
        time.sleep(4 if args[0].rank == 0 else 0)
        return outcome

    healthy = rounds.Rounds._run
    monkeypatch.setattr(rounds.Rounds, "_run", lambda *args: late(healthy, *args))
    on_sick_rank(monkeypatch, dist, "new_group", fail)
    found = run("--tp", "2", "--nproc", "4")
    assert found.status == 1
    assert "error on rank 1: RuntimeError: no route to host" in found.error


# ---- ranks that hang, stop and die ---------------------------------------------------------


def test_a_hang_is_named_within_the_timeout(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(call: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        while axis.name == "tp":
            time.sleep(0.1)
        return call()

    on_sick_rank(monkeypatch, collectives, "scatter_sum_along", hang)
    found = run("--tp", "2", "--nproc", "4", "--timeout", "3")
    assert found.status == 1
    assert found.seconds < 15
    text = found.line("tp=tp-cp", "reduce_scatter")
    # Where each rank stands tells the one that hangs from the one that waits for it.
    assert re.search(r"^hung on ranks 0 1 in float32: rank 0: \w+ \(.*\), rank 1: hang ", text)
    assert "(test_doctor.py:" in text
    assert found.line("tp=tp-cp", "barrier").startswith("not run")
    # Ranks 2 and 3 have nothing to do with it, nor has any other axis.
    (check,) = (c for c in found.axis("tp")["checks"] if c["status"] == "hung")
    assert [failure["rank"] for failure in check["failures"]] == [0, 1]
    assert set(found.statuses("dp").values()) == {"ok"}
    assert "reduce_scatter over tp=tp-cp (hung on ranks 0 1)\n" in found.error


def test_a_stopped_rank_is_named(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "SLACK", 2.0)

    def stop(call: Any, *args: Any) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    on_sick_rank(monkeypatch, collectives, "exchange_rows", stop)
    found = run("--tp", "2", "--timeout", "2")
    assert found.status == 1
    assert found.seconds < 15
    assert "no answer from rank 1 in float32: stopped, dead or starved" in found.out
    assert re.search(
        r"all_to_all over tp=.* \(hung on rank 0, no answer on rank 1\)|"
        r"all_to_all over tp=.* \(no answer on rank 1, hung on rank 0\)",
        found.error,
    )
    assert found.json["counts"]["silent"] == 1


def test_a_rank_that_dies_is_named(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    on_sick_rank(monkeypatch, dist, "broadcast", lambda call, *args: os._exit(3))
    found = run("--tp", "2")
    assert found.status == 1
    assert "rank 1 of 2 exited with status 3 without returning a result" in found.error


# ---- under torchrun ------------------------------------------------------------------------


def test_under_torchrun(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    words = ["--tp", "2", "--bytes", "64", "--repeats", "1", "--device", "cpu", "--json", str(file)]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*start, "-m", "fivefold.parallel_core", "doctor", *words],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 ranks on 1 node of 2, ")
    assert done.stdout.count("all 25 checks ok\n") == 1
    assert json.loads(file.read_text())["counts"] == {"ok": 25}


def as_torchrun(*words: str) -> list[int | None]:
    """Run the command in two processes that are set up as torchrun does; their statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def be_rank(rank: int) -> None:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in names.items()}
        torch.set_num_threads(1)
        os._exit(main(["doctor", "--device", "cpu", "--bytes", "64", "--repeats", "1", *words]))

    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=be_rank, args=(rank,), daemon=True) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    return [rank.exitcode for rank in ranks]


def test_a_hang_under_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def hang(call: Any, *args: Any) -> None:
        while True:
            time.sleep(0.1)

    on_sick_rank(monkeypatch, collectives, "start_shift", hang)
    file = tmp_path / "report.json"
    assert as_torchrun("--tp", "2", "--timeout", "3", "--json", str(file)) == [1, 1]
    out, error = capfd.readouterr()
    assert re.search(r"ring_shift +hung on ranks 0 1 in float32: .*rank 1: hang \(", out)
    message = "error: 1 of 25 checks failed, 6 were not run: ring_shift over tp="
    assert error.count(f"fivefold-parallel-core: {message}") == 1
    assert json.loads(file.read_text())["counts"] == {"hung": 1, "not run": 6, "ok": 18}


def test_a_first_rank_that_dies_under_torchrun(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nobody is left to tell, but the others end, and that is what torchrun looks at."""
    monkeypatch.setattr(sys.modules[__name__], "SICK", 0)
    on_sick_rank(monkeypatch, dist, "broadcast", lambda call, *args: os._exit(7))
    start = time.monotonic()
    assert as_torchrun("--tp", "2") == [7, 1]
    assert time.monotonic() - start < 30


def test_an_illegal_layout_under_torchrun(capfd: pytest.CaptureFixture[str]) -> None:
    assert as_torchrun("--tp", "3") == [2, 2]
    error = capfd.readouterr().err
    assert error.count("world_size 2 is not a multiple of tp*cp*pp = 3*1*1 = 3") == 1


def test_ranks_that_do_not_meet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**options: Any) -> None:
        raise dist.DistNetworkError("The client socket has timed out\nand more")

    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(command, "connect", fail)
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == (
        "fivefold-parallel-core: error: the ranks that torchrun started do not meet: "
        "The client socket has timed out\n"
    )


# ---- without ranks -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 129, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_exact_in_every_order(size: int, dtype: torch.dtype) -> None:
    axis = Axis("tp", size, 0, tuple(range(0, 3 * size, 3)))
    values = Values(axis, dtype, torch.device("cpu"), 4)
    brought = torch.stack([values.brought(i) for i in range(size)])
    assert brought.dtype == dtype
    for order in (range(size), reversed(range(size))):
        total = torch.zeros_like(brought[0])
        for index in order:
            total += brought[index]
        assert torch.equal(total.long(), values.total())
    assert torch.equal(brought.long().amax(0), values.greatest())


def test_values_tell_ranks_and_positions_apart() -> None:
    axis = Axis("tp", 4, 0, (1, 3, 5, 7))
    for dtype in DTYPES:
        values = Values(axis, dtype, torch.device("cpu"), 64)
        brought = torch.stack([values.brought(i) for i in range(4)]).double()
        for index in range(4):
            assert len(brought[index].unique()) > 30
            assert (brought[index] != brought[index].roll(1)).double().mean() > 0.9
            assert (brought[index] != brought[index - 1]).double().mean() > 0.9
    other = Values(Axis("tp", 4, 0, (0, 2, 4, 6)), torch.int64, torch.device("cpu"), 64)
    assert not torch.equal(other.brought(0), values.brought(0))


def test_sizes_are_rounded_to_whole_pieces() -> None:
    axis, cpu = Axis("tp", 3, 0, (0, 1, 2)), torch.device("cpu")
    assert Values.of_size(axis, torch.float32, cpu, 120).rows == 10
    assert Values.of_size(axis, torch.bfloat16, cpu, 120).rows == 20
    assert Values.of_size(axis, torch.int64, cpu, 1).rows == 1


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([1.0, 2.0], ""),
        ([1.0, 3.0], "1 of 2 values differ, the first at 1: found 3.0, must be 2.0"),
        ([float("nan"), 0.0], "2 of 2 values differ, the first at 0: found nan, must be 1.0"),
        ([1.0], "found torch.float32 of shape (1,), must be torch.float32 of shape (2,)"),
    ],
)
def test_differences_in_words(found: list[float], words: str) -> None:
    assert difference(torch.tensor(found), torch.tensor([1.0, 2.0])) == words


def test_a_result_of_another_dtype_is_wrong() -> None:
    words = "found torch.float64 of shape (1,), must be torch.float32 of shape (1,)"
    assert difference(torch.ones(1).double(), torch.ones(1)) == words


def test_equal_groups_are_examined_once() -> None:
    found = {examined.axes: examined.groups for examined in shared_groups(Layout(8, tp=2, ep=4))}
    assert sorted(name for axes in found for name in axes) == sorted([*AXES, "world"])
    assert len(set(found.values())) == len(found)
    assert found["tp", "tp-cp"] == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert found["tp-dp-cp", "world"] == (tuple(range(8)),)
    assert found["edp",] == ((0, 4), (1, 5), (2, 6), (3, 7))


def test_a_long_list_of_groups_is_cut() -> None:
    groups = tuple((2 * i, 2 * i + 1) for i in range(5))
    assert Examined(("tp",), groups).heading() == "tp: groups of 2, [0 1] [2 3] [4 5] [6 7] ..(5)"


def test_the_slowest_rank_and_the_worst_status_count() -> None:
    fast = Verdict(status="ok", seconds=(1.0, 2.0, 3.0), sent=8.0)
    slow = Verdict(status="ok", seconds=(4.0, 2.0, 9.0), sent=4.0)
    check = Check(collective="all_reduce", dtype="float32", verdicts=(fast, slow))
    assert (check.minimum, check.median, check.sent, check.speed) == (2.0, 4.0, 8.0, 2.0)
    words = " ".join(line("tp", [check]).split())
    assert words == "tp all_reduce ok min 2000.000 ms median 4000.000 ms 0.000 GB/s"
    wrong, hung = Verdict(status="wrong", detail="x"), Verdict(status="hung", detail="y")
    check = Check(collective="all_reduce", dtype="float32", verdicts=(fast, wrong, hung, None))
    assert check.status == "silent"
    report = Report(Layout(1), {}, [Examined(("tp",), ((0, 1, 2, 3),), [check])])
    assert report.silent == [3] and not report.is_ok
    assert report.summary() == (
        "1 of 1 checks failed: "
        "all_reduce over tp (no answer on rank 3, hung on rank 2, WRONG on rank 1)"
    )


@pytest.mark.parametrize("name", ["nbytes", "repeats", "timeout"])
def test_options_are_positive(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}=0: must be above 0$"):
        Options(**{name: 0})
