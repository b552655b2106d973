"""Whole parameters on every rank: what is sent, what is kept, and in which dtype it is summed.

That training equals one process is in test_forms.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from fivefold.parallel_core.checkpoint import Checkpoints, load_parts
from fivefold.parallel_core.chunks import Chunks
from fivefold.parallel_core.data_parallel import (
    Precision,
    gather_mains,
    reduce_gradients,
    shard_data,
)
from fivefold.parallel_core.data_parallel_config import DataParallelConfig
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.ledger import CommLedger
from fivefold.parallel_core.parameters import ParameterTable, Placement
from fivefold.parallel_core.plan import parallelize
from fivefold.parallel_core.replicas import Replicas
from fivefold.parallel_core.topology import Axis, Topology

from .imagined import imagined
from .rig import DOUBLE, Case, Job, make_job, parallel_run, worst
from .test_checkpoint import copies, differing, parts_of
from .toy import Toy, ToyConfig, plan

CONFIG = ToyConfig(num_experts=4)
DEGREES = {"tp": 2, "ep": 2}
NUM_RANKS, NUM_UNITS, NUM_MICROBATCHES = 8, 3, 2  # two layers and the rest
HALF = Precision(compute="bfloat16")


def form(form: str, precision: Precision = DOUBLE, **sizes: object) -> Case:
    data = DataParallelConfig(form=form, **sizes)  # type: ignore[arg-type]
    return Case(degrees=DEGREES, config=CONFIG, data=data, precision=precision)


FORMS = [
    form("replicate"),
    form("replicate", HALF),
    form("zero1"),
    form("zero1", HALF),
    form("zero1", shard_size=2, expert_shard_size=2),
    form("zero2"),
    form("zero2", HALF),
    form("zero2", shard_size=2, expert_shard_size=1),
    form("zero3"),
    form("zero3", HALF, shard_size=2),
    form("zero3", expert_form="replicate"),
    form("zero1", expert_form="zero3", expert_shard_size=2),
]


# ---- the formulas --------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """Dense or expert parameters: their local shapes, and how a form lays them out."""

    data: str
    form: str
    shapes: list[tuple[int, ...]]
    shard_size: int
    num_copies: int


def kinds(case: Case) -> Iterator[Kind]:
    """From the shapes that the plan alone leaves on a rank."""
    topology = imagined(NUM_RANKS, **DEGREES)[0]
    model = Toy(case.config)
    table = parallelize(model, topology, plan(case.config))
    for data in ("dp-cp", "edp"):
        size = topology.size(data)
        shard_size = case.data.shard_size_of(data, size)
        shapes = [
            tuple(p.shape) for name, p in model.named_parameters() if table[name].data == data
        ]
        yield Kind(data, case.data.form_of(data), shapes, shard_size, size // shard_size)


def sent_in_a_step(case: Case) -> dict[tuple[str, str], tuple[int, float]]:
    """Calls and bytes of a step by the formulas: P elements with padding on d x r ranks.

    Gradients: reduce-scatter (d-1)/d·P in the storage dtype and all-reduce 2(r-1)/r·P/d.
    Parameters in the compute dtype: (d-1)/d·P once in ZeRO-1, once a microbatch in ZeRO-2 and
    twice in ZeRO-3.
    """
    storage, compute = case.precision.storage_dtype.itemsize, case.precision.compute_dtype.itemsize
    sent: dict[tuple[str, str], tuple[int, float]] = {}
    for kind in kinds(case):
        d, r = kind.shard_size, kind.num_copies
        elements = sum(Chunks(shape, d).padded * d for shape in kind.shapes)
        units = NUM_UNITS if kind.data == "dp-cp" else CONFIG.num_layers
        per_microbatch = {"zero2": 1, "zero3": 2}.get(kind.form, 0)
        gathers = NUM_MICROBATCHES * per_microbatch or 1
        shard = kind.data if r == 1 else f"{kind.data}%{d}"
        replicate = kind.data if d == 1 else f"{kind.data}//{d}"
        if d > 1:
            ring = (d - 1) / d * elements
            sent["reduce_scatter", shard] = (units, ring * storage)
            sent["all_gather", shard] = (units * gathers, gathers * ring * compute)
        if r > 1:
            sent["all_reduce", replicate] = (units, 2 * (r - 1) / r * elements / d * storage)
    return sent


def elements_kept(case: Case, rank: int) -> tuple[int, int]:
    """Elements of the optimizer's parameters and of the module's own on a rank."""
    updated = whole = 0
    topology = imagined(NUM_RANKS, **DEGREES)[rank]
    for kind in kinds(case):
        index = topology.rank(kind.data) % kind.shard_size
        boxes = [Chunks(shape, kind.shard_size).box(index) for shape in kind.shapes]
        shard = sum(box.numel for box in boxes)
        updated += shard
        all_of_it = sum(torch.Size(shape).numel() for shape in kind.shapes)
        whole += all_of_it if kind.form in ("replicate", "zero1") else shard
    return updated, whole


# ---- and what happens ----------------------------------------------------------------------


@dataclass
class Found:
    """What one rank sent in a step and keeps after it."""

    sent: dict[tuple[str, str], tuple[int, float]]
    moments: int
    updated: int
    whole: int
    whole_bytes: int
    storages: int
    is_float32: bool


def look(case: Case, topology: Topology) -> Found:
    job = make_job(case, topology)
    with CommLedger(topology) as ledger:
        job.runner.train(*job.data(), 1.0)
    sent = {key: (entry.calls, entry.bytes) for key, entry in ledger.entries.items()}
    job.update()
    state = job.optimizer._optimizer.state.values()
    own = [
        p.to_local() if hasattr(p, "to_local") else p
        for part in job.model.parts
        for p in part.parameters()
    ]
    locals_ = [piece.local for piece in job.pieces]
    return Found(
        sent={key: value for key, value in sent.items() if key[1].startswith(("dp-cp", "edp"))},
        moments=sum(s["exp_avg"].nbytes + s["exp_avg_sq"].nbytes for s in state),
        updated=sum(x.numel() for x in locals_),
        whole=sum(x.numel() for x in own),
        whole_bytes=sum(x.nbytes for x in own),
        storages=len({x.untyped_storage().data_ptr() for x in (*locals_, *own) if x.numel()}),
        is_float32=all(x.dtype == case.precision.storage_dtype for x in locals_),
    )


@pytest.fixture(scope="module")
def found() -> list[list[Found]]:
    """Of every form, for each rank."""

    def on_a_rank() -> list[Found]:
        topology = Topology(Layout(NUM_RANKS, **DEGREES))
        return [look(case, topology) for case in FORMS]

    return [list(ranks) for ranks in zip(*launch(on_a_rank, NUM_RANKS, timeout=300), strict=True)]


@pytest.mark.parametrize("index", range(len(FORMS)), ids=map(str, FORMS))
def test_a_step_sends_what_the_formula_says(found: list[list[Found]], index: int) -> None:
    wanted = sent_in_a_step(FORMS[index])
    assert wanted
    for rank in found[index]:
        assert rank.sent == wanted


@pytest.mark.parametrize("index", range(len(FORMS)), ids=map(str, FORMS))
def test_a_rank_keeps_what_the_formula_says(found: list[list[Found]], index: int) -> None:
    """Two moments of the storage dtype for each element that the rank updates."""
    case = FORMS[index]
    for rank, kept in enumerate(found[index]):
        updated, whole = elements_kept(case, rank)
        assert (kept.updated, kept.whole) == (updated, whole)
        assert kept.moments == 2 * updated * case.precision.storage_dtype.itemsize
        assert kept.is_float32
        if case.data.form in ("replicate", "zero1") and case.data.expert_form is None:
            assert kept.whole_bytes == whole * case.precision.compute_dtype.itemsize


def test_replicas_of_one_dtype_are_kept_once(found: list[list[Found]]) -> None:
    num_parameters = len(list(Toy(CONFIG).parameters()))
    assert {rank.storages for rank in found[0]} == {num_parameters}
    assert {rank.storages for rank in found[1]} == {2 * num_parameters}


# ---- checkpoints ---------------------------------------------------------------------------

CHAIN = [
    Case(degrees={}, config=CONFIG, data=DataParallelConfig(form="replicate")),
    Case(degrees={"tp": 2}, config=CONFIG, data=DataParallelConfig(form="zero1")),
    Case(degrees={}, config=CONFIG, data=DataParallelConfig(form="zero3", shard_size=2)),
    Case(degrees={"ep": 2}, config=CONFIG, data=DataParallelConfig(form="zero1", shard_size=2)),
    Case(degrees={}, config=CONFIG, data=DataParallelConfig(form="zero1", expert_form="zero2")),
]
"""Each loads what the one before has saved; every one of them trains on afterwards."""


def travel(folder: Path, path: Path, third: object, wholes: object) -> tuple[list[str], float]:
    changed: list[str] = []
    largest = 0.0
    for index, case in enumerate(CHAIN):
        job: Job = make_job(case)
        load_parts(path, parts_of(job))
        job.optimizer.set_steps(2)
        changed += differing(job, wholes)  # type: ignore[arg-type]
        path = Checkpoints(folder / str(index + 1)).save(2, parts_of(job), {})
        error, _ = worst(job, parallel_run(job, steps=1), third)  # type: ignore[arg-type]
        largest = max(largest, error)
    return changed, largest


def test_any_form_goes_on_from_any_other_bit_for_bit(tmp_path: Path) -> None:
    alone = make_job(Case(degrees={}, config=CONFIG, microbatch_size=8))
    parallel_run(alone, steps=2)
    wholes = copies(alone)
    path = Checkpoints(tmp_path / "0").save(2, parts_of(alone), {})
    third = parallel_run(alone, steps=1)
    for changed, error in launch(travel, 4, tmp_path, path, third, wholes, timeout=300):
        assert changed == []
        assert error < 1e-12
    (last,) = (tmp_path / str(len(CHAIN))).iterdir()
    again = make_job(Case(degrees={}, config=CONFIG, microbatch_size=8))
    load_parts(last, parts_of(again))
    assert differing(again, wholes) == []


# ---- one process ---------------------------------------------------------------------------

ALONE = Axis("dp-cp", 1, 0, (0,))


def mixed(model: nn.Module) -> Replicas:
    return Replicas(
        model, [["weight"]], ALONE, ALONE, storage=torch.float32, compute=torch.bfloat16
    )


def test_values_are_kept_before_they_are_rounded_and_rounded_when_gathered() -> None:
    model = nn.Linear(1, 1, bias=False)
    value = 1.0 + 2.0**-12
    with torch.no_grad():
        model.weight.fill_(value)
    replicas = mixed(model)
    main = replicas.main("weight")
    assert (main.dtype, main.item()) == (torch.float32, value)
    assert model.weight.dtype == torch.bfloat16
    with torch.no_grad():
        main.fill_(3.0)
    assert model(torch.ones(1, 1, dtype=torch.bfloat16)).item() == 3.0, "forward gathers"


def test_gradients_of_bfloat16_are_summed_in_float32() -> None:
    """In bfloat16 256 + 1 is 256."""
    model = nn.Linear(1, 1, bias=False)
    replicas = mixed(model)
    replicas.gather()
    for x in (256.0, 1.0, 1.0):
        model(torch.full((1, 1), x, dtype=torch.bfloat16)).sum().backward()
        assert model.weight.grad is None
    replicas.reduce()
    gradient = replicas.main("weight").grad
    assert gradient is not None
    assert (gradient.dtype, gradient.item()) == (torch.float32, 258.0)


def test_a_gradient_that_no_hook_saw_is_taken_up() -> None:
    model = nn.Linear(1, 1, bias=False)
    replicas = mixed(model)
    replicas.gather()
    for value in (256.0, 1.0):
        model.weight.grad = torch.full((1, 1), value, dtype=torch.bfloat16)
        replicas.collect()
    replicas.reduce()
    gradient = replicas.main("weight").grad
    assert gradient is not None
    assert gradient.item() == 257.0


def test_a_parameter_without_gradient_has_zeros_and_a_frozen_one_none() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight.requires_grad_(False)
    names = [name for name, _ in model.named_parameters()]
    replicas = Replicas(model, [names], ALONE, ALONE, storage=torch.float32, compute=torch.bfloat16)
    replicas.gather()
    replicas.reduce()
    trained, frozen = (replicas.main(name) for name in names)
    assert trained.grad is not None
    assert trained.grad.eq(0).all()
    assert frozen.grad is None
    assert not frozen.requires_grad


def test_a_parameter_without_dims_is_refused() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ConfigError, match=r"weight has no dims .* the shape \(1,\)"):
        mixed(model)


def test_functions_of_a_model_without_replicas_do_nothing() -> None:
    model = nn.Linear(2, 2)
    gather_mains(model)
    model(torch.ones(1, 2)).sum().backward()
    reduce_gradients(model)
    assert model.weight.grad is not None


def test_modules_that_own_dense_and_expert_parameters_need_whole_parameters() -> None:
    def on_a_rank() -> str:
        topology = Topology(Layout(2))
        model = nn.Module()
        model.both = nn.Linear(2, 2)
        table = ParameterTable(topology)
        table.add("both.weight", Placement(shape=(2, 2)))
        table.add("both.bias", Placement(shape=(2,), data="edp"))
        try:
            shard_data(model, table, (), DOUBLE)
        except ConfigError as error:
            return str(error)
        return ""

    for message in launch(on_a_rank, 2, timeout=120):
        assert message.startswith("both owns expert parameters and both.weight, which are not")
