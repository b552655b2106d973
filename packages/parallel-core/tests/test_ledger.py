"""The ledger on 4 ranks: what torch.distributed sends is counted, on the right axis."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fivefold.parallel_core.collectives import all_gather, exchange_rows
from fivefold.parallel_core.data_parallel import Precision, shard_data
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.ledger import CommLedger, Entry, labelled
from fivefold.parallel_core.parameters import ParameterTable, Placement
from fivefold.parallel_core.topology import Topology

Counted = dict[tuple[str, str], tuple[int, float]]


def count(topology: Topology, send: Callable[[], object]) -> Counted:
    with CommLedger(topology) as ledger:
        send()
    return {key: (entry.calls, entry.bytes) for key, entry in ledger.entries.items()}


def torch_collectives(topology: Topology) -> dict[str, Counted]:
    """Each of torch's collectives on 10 float32 (40 bytes) over "tp" of 2 ranks."""
    group = topology.group("tp")
    x, pair = torch.ones(10), torch.ones(20)
    return {
        "all_reduce": count(topology, lambda: dist.all_reduce(x, group=group)),
        "all_gather": count(topology, lambda: dist.all_gather([x, x.clone()], x, group=group)),
        "reduce_scatter": count(
            topology, lambda: dist.reduce_scatter(x, list(pair.chunk(2)), group=group)
        ),
        "broadcast": count(topology, lambda: dist.broadcast(x, group_src=0, group=group)),
        "all_to_all": count(topology, lambda: dist.all_to_all_single(x, x + 1, group=group)),
    }


def messages(topology: Topology) -> tuple[Counted, Counted]:
    """What rank 0 of the pipeline counts that sends 4 float64, and what rank 1 that receives."""
    pp = topology.axis("pp")
    x = torch.ones(4, dtype=torch.float64)

    def one() -> None:
        if pp.rank == 0:
            dist.send(x, dst=pp.ranks[1], group=pp.group)
        else:
            dist.recv(x, src=pp.ranks[0], group=pp.group)

    def batched() -> None:
        kind, peer = (dist.isend, 1) if pp.rank == 0 else (dist.irecv, 0)
        operation = dist.P2POp(kind, x, group=pp.group, group_peer=peer)
        for work in dist.batch_isend_irecv([operation]):
            work.wait()

    return count(topology, one), count(topology, batched)


def uneven_exchange(topology: Topology) -> Counted:
    """2 rows stay and 3 go, of 16 bytes."""
    tp = topology.axis("tp")
    splits = [2, 3] if tp.rank == 0 else [3, 2]
    x = torch.ones(5, 4)
    return count(topology, lambda: exchange_rows(x, splits, splits, tp))


def labels() -> tuple[Counted, Counted]:
    """Three axes of one group: a label says which, and without one the first name stands."""
    topology = Topology(Layout(4, tp=4, ep=4))
    assert topology.group("tp") is topology.group("ep")
    x = torch.ones(1, 2)

    def named() -> None:
        all_gather(x, topology.axis("ep"), 0)
        with labelled("pp"):
            dist.barrier()  # not a transfer
            dist.all_reduce(x)
        all_gather(x, topology.axis("tp"), 0)

    return count(topology, named), count(topology, lambda: dist.all_reduce(x))


def fsdp_step() -> Counted:
    """Forward and backward of a layer of 16 float32 over 4 data ranks."""
    topology = Topology(Layout(4))
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    table = ParameterTable(topology)
    table.add("0.weight", Placement(shape=(4, 4)))
    shard_data(model, table, (), Precision())
    return count(topology, lambda: model(torch.ones(2, 4)).sum().backward())


def unknown_group(topology: Topology) -> Counted:
    group = dist.new_group([0, 3])
    x = torch.ones(2)

    def send() -> None:
        if dist.get_rank() in (0, 3):
            dist.all_reduce(x, group=group)

    return count(topology, send)


def across_nodes() -> dict[str, float]:
    """Bytes that leave this rank's node of two; one row is one float32."""
    topology = Topology(Layout(4, tp=4))
    tp, x = topology.axis("tp"), torch.ones(10, 1)

    def message() -> None:
        if tp.rank in (0, 1):
            dist.send(x, dst=(2, 0)[tp.rank], group=tp.group)
        if tp.rank in (0, 2):
            dist.recv(x, src=(1, None, 0)[tp.rank], group=tp.group)

    sends: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: dist.all_reduce(x[:4].clone(), group=tp.group),
        "all_to_all": lambda: dist.all_to_all_single(x[:8].clone(), x[:8].clone(), group=tp.group),
        "uneven": lambda: exchange_rows(x, [tp.rank + 1] * 4, [1, 2, 3, 4], tp),
        "send": message,
    }
    found = {}
    for name, send in sends.items():
        with CommLedger(topology, ranks_per_node=2) as ledger:
            send()
        found[name] = sum(entry.bytes_between_nodes for entry in ledger.entries.values())
    return found


def on_a_rank() -> dict[str, object]:
    topology = Topology(Layout(4, tp=2, pp=2))
    return {
        "torch": torch_collectives(topology),
        "messages": messages(topology),
        "uneven": uneven_exchange(topology),
        "unknown": unknown_group(topology),
        "labels": labels(),
        "fsdp": fsdp_step(),
        "nodes": across_nodes(),
    }


@pytest.fixture(scope="module")
def job() -> list[dict[str, object]]:
    return launch(on_a_rank, 4, timeout=300)


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        ("all_reduce", 40),  # 2 · 1/2 · 40
        ("all_gather", 40),  # 1/2 · 80
        ("reduce_scatter", 40),  # 1/2 · 80
        ("broadcast", 20),  # 1/2 · 40
        ("all_to_all", 20),  # half of the rows stay
    ],
)
def test_torchs_collectives_are_counted_with_ring_bytes(
    job: list[dict[str, object]], name: str, sent: float
) -> None:
    for results in job:
        assert results["torch"][name] == {(name, "tp"): (1, sent)}  # type: ignore[index]


def test_messages_are_counted_where_they_are_sent(job: list[dict[str, object]]) -> None:
    sent = {("send", "pp"): (1, 32)}
    for results, wanted in zip(job, (sent, sent, {}, {}), strict=True):
        assert results["messages"] == (wanted, wanted)


def test_only_rows_that_leave_the_rank_are_counted(job: list[dict[str, object]]) -> None:
    for results in job:
        assert results["uneven"] == {("all_to_all", "tp"): (1, 3 * 16)}


def test_a_group_of_no_axis_is_counted_as_other(job: list[dict[str, object]]) -> None:
    inside = {("all_reduce", "other"): (1, 8)}
    assert [results["unknown"] for results in job] == [inside, {}, {}, inside]


def test_axes_that_share_a_group_are_told_apart(job: list[dict[str, object]]) -> None:
    named, unnamed = job[0]["labels"]  # type: ignore[misc]
    assert named == {
        ("all_gather", "ep"): (1, 24),
        ("all_reduce", "pp"): (1, 12),
        ("all_gather", "tp"): (1, 24),
    }
    assert unnamed == {("all_reduce", "tp"): (1, 12)}


def test_fsdp_is_counted(job: list[dict[str, object]]) -> None:
    assert job[0]["fsdp"] == {
        ("all_gather", "dp-cp"): (1, 48),  # 3/4 of 64 bytes
        ("reduce_scatter", "dp-cp"): (1, 48),
    }


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        ("all_reduce", [0, 24, 0, 24]),  # a ring leaves the node behind its second rank
        ("all_to_all", [16, 16, 16, 16]),  # 2 of 4 rows to each rank of the other node
        ("uneven", [28, 28, 12, 12]),
        ("send", [40, 0, 0, 0]),  # 0 to 2; 1 to 0 stays
    ],
)
def test_bytes_between_nodes(job: list[dict[str, object]], name: str, sent: list[float]) -> None:
    assert [results["nodes"][name] for results in job] == sent  # type: ignore[index]


def test_an_empty_ledger_has_empty_entries_and_a_report() -> None:
    with CommLedger(Topology.local()) as ledger:
        torch.ones(3).sum()
    assert ledger["all_reduce", "tp"] == Entry(0, 0)
    assert not ledger.entries, "asking makes no entry"
    assert ledger.report().split() == ["collective", "axis", "calls", "bytes", "sent"]


def test_the_report_has_a_line_for_each_entry() -> None:
    ledger = CommLedger(Topology.local())
    ledger.entries["all_gather", "tp"] = Entry(6, 1234567.0)
    ledger.entries["all_gather", "cp"] = Entry(2, 0.0)
    lines = [line.split() for line in ledger.report().splitlines()]
    assert lines[1:] == [["all_gather", "cp", "2", "0"], ["all_gather", "tp", "6", "1,234,567"]]
