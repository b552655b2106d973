"""FSDP as we use it: dtypes, when weights are gathered and freed, when gradients are reduced."""

from dataclasses import dataclass
from math import log

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fivefold.parallel_core.config import replace
from fivefold.parallel_core.data_parallel import Precision, shard_data
from fivefold.parallel_core.data_parallel_config import DataParallelConfig
from fivefold.parallel_core.errors import ConfigError, LayoutError
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.ledger import CommLedger
from fivefold.parallel_core.parameters import ParameterTable

from .rig import (
    DOUBLE,
    LEARNING_RATE,
    Case,
    Record,
    batch,
    make_job,
    num_valid,
    plain_run,
    world_sum,
)
from .toy import ToyConfig, resized

CONFIG = ToyConfig(num_experts=4)
HALF = Precision(parameters="float32", compute="bfloat16")
ZERO1 = DataParallelConfig(form="zero1")
HALVES = {
    "data": Case(degrees={}, config=CONFIG, precision=HALF),
    "tensor": Case(degrees={"tp": 2}, config=CONFIG, precision=HALF),
    "one data rank": Case(degrees={"tp": 4, "ep": 4}, config=CONFIG, precision=HALF),
    "stages": Case(degrees={"pp": 2}, config=CONFIG, precision=HALF, microbatch_size=2),
    "ZeRO-1": Case(degrees={}, config=CONFIG, precision=HALF, data=ZERO1),
    "ZeRO-1 with tensor": Case(
        degrees={"tp": 2, "ep": 2}, config=CONFIG, precision=HALF, data=ZERO1
    ),
    "ZeRO-1 in halves of the backward": Case(
        degrees={"pp": 2},
        config=resized(CONFIG, num_layers=4),
        precision=HALF,
        data=ZERO1,
        schedule="ZBVZeroBubble",
        stages_per_rank=2,
    ),
    "replicas": Case(
        degrees={}, config=CONFIG, precision=HALF, data=DataParallelConfig(form="replicate")
    ),
    "copies": Case(
        degrees={},
        config=CONFIG,
        precision=HALF,
        data=DataParallelConfig(shard_size=2, expert_form="zero1", expert_shard_size=2),
    ),
}


def test_precision_names_torchs_dtypes() -> None:
    assert (HALF.storage_dtype, HALF.compute_dtype) == (torch.float32, torch.bfloat16)
    assert (DOUBLE.storage_dtype, DOUBLE.compute_dtype) == (torch.float64, torch.float64)
    assert Precision.from_dict(HALF.to_dict()) == HALF
    with pytest.raises(ConfigError, match="bfloat16"):
        replace(HALF, parameters="bfloat16")


def test_one_data_rank_of_one_dtype_needs_no_fsdp() -> None:
    model = nn.Linear(2, 2)
    shard_data(model, ParameterTable.of(model), (), Precision())
    assert not isinstance(model, FSDPModule)


def test_another_dtype_to_compute_in_needs_a_process_group() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(LayoutError, match=r"no process group.*another dtype.*launch\(\)"):
        shard_data(model, ParameterTable.of(model), (), HALF)


# ---- bfloat16 ------------------------------------------------------------------------------


@dataclass
class Near:
    """How far one bfloat16 step is from float32, and what it left behind."""

    loss: float
    norm: float
    gradients: float
    dtypes: set[torch.dtype]
    is_finer_than_bfloat16: bool
    largest_update: float


def bfloat16_step(case: Case, reference: Record) -> Near:
    job = make_job(case)
    before = {piece.name: piece.tensor.clone() for piece in job.pieces}
    loss, _ = job.backward()
    gradients = job.gradients()
    off, size = 0.0, 0.0
    for piece in job.pieces:
        if piece.counted and piece.name in gradients:
            wanted = reference.gradients[piece.name][piece.box.slices]
            off += (gradients[piece.name] - wanted).square().sum().item()
            size += wanted.square().sum().item()
    off, size = world_sum(off), world_sum(size)
    dtypes = {piece.grad.dtype for piece in job.pieces if piece.grad is not None}
    norm = job.update()
    parts = job.optimizer.parts().values()
    dtypes |= {part.tensor.dtype for part in parts} | {piece.local.dtype for piece in job.pieces}
    after = torch.cat([piece.tensor.flatten() for piece in job.pieces])
    updates = [(piece.tensor - before[piece.name]).abs() for piece in job.pieces if piece.box.numel]
    return Near(
        loss=abs(loss / reference.losses[0] - 1),
        norm=abs(norm / reference.norms[0] - 1),
        gradients=(off / size) ** 0.5,
        dtypes=dtypes,
        is_finer_than_bfloat16=not torch.equal(after.bfloat16().float(), after),
        largest_update=max(update.max().item() for update in updates),
    )


@pytest.fixture(scope="module")
def near() -> dict[str, list[Near]]:
    """For every case what each rank found."""
    references = {case.config: plain_run(case.config, steps=1) for case in HALVES.values()}
    reference = references[CONFIG]

    def on_a_rank() -> dict[str, Near]:
        cases = HALVES.items()
        return {name: bfloat16_step(case, references[case.config]) for name, case in cases}

    ranks = launch(on_a_rank, 4, timeout=300)
    alone = launch(lambda: bfloat16_step(HALVES["data"], reference), 1, timeout=300)
    return {name: [rank[name] for rank in ranks] for name in HALVES} | {"one rank": alone}


@pytest.mark.parametrize("name", [*HALVES, "one rank"])
def test_bfloat16_is_near_float32(near: dict[str, list[Near]], name: str) -> None:
    """bfloat16 keeps 8 bits, so each rounding is off by at most 2^-9 = 0.2%.

    A path through two layers rounds about 20 times; independent, that is sqrt(20) · 0.2% ≈ 1% of
    each gradient. A missing or doubled sum would be off by 30% and more.
    """
    for found in near[name]:
        assert 1e-6 < found.loss < 0.01
        assert found.norm < 0.05
        assert 1e-3 < found.gradients < 0.05


@pytest.mark.parametrize("name", [*HALVES, "one rank"])
def test_parameters_gradients_and_moments_stay_in_float32(
    near: dict[str, list[Near]], name: str
) -> None:
    for found in near[name]:
        assert found.dtypes == {torch.float32}
        assert found.is_finer_than_bfloat16
        assert 0 < found.largest_update < 2 * LEARNING_RATE


# ---- gathering and reducing ----------------------------------------------------------------


@dataclass
class Watched:
    """What one rank of 4 data ranks sent and held."""

    sent: dict[tuple[str, str], tuple[int, float]]
    sharded_after_evaluation: bool
    losses: tuple[float, float]


def watch(reshard: bool) -> Watched:
    """Two microbatches, then evaluations before and after the parameters change."""
    data = DataParallelConfig(form="zero3" if reshard else "zero2")
    job = make_job(Case(degrees={}, data=data))
    with CommLedger(job.topology) as ledger:
        job.runner.train(*job.data(), 1.0)
    before = job.total(job.runner.evaluate(*job.data()).item())
    sharded = all(isinstance(p, DTensor) for p in job.model.parts[0].parameters())
    for piece in job.pieces:
        piece.local.zero_()
    after = job.total(job.runner.evaluate(*job.data()).item())
    sent = {key: (entry.calls, entry.bytes) for key, entry in ledger.entries.items()}
    return Watched(sent, sharded, (before, after))


@pytest.fixture(scope="module")
def watched() -> list[tuple[Watched, Watched]]:
    """Of each rank without and with resharding."""
    return launch(lambda: (watch(False), watch(True)), 4, timeout=300)


def test_gradients_are_reduced_once_however_many_microbatches(
    watched: list[tuple[Watched, Watched]],
) -> None:
    """Of three units: two layers and the rest."""
    for found in (found for pair in watched for found in pair):
        assert found.sent["reduce_scatter", "dp-cp"][0] == 3


def test_weights_are_gathered_again_in_backward_only_if_they_were_freed(
    watched: list[tuple[Watched, Watched]],
) -> None:
    """Two microbatches."""
    for kept, freed in watched:
        once = kept.sent["reduce_scatter", "dp-cp"][1]
        assert kept.sent["all_gather", "dp-cp"] == (2 * 3, 2 * once)
        calls, sent = freed.sent["all_gather", "dp-cp"]
        assert (calls, sent) == (4 * 3, 4 * once)


def test_evaluation_frees_what_it_gathered_and_sees_new_values(
    watched: list[tuple[Watched, Watched]],
) -> None:
    uniform = num_valid(batch(37)[1]) * log(37)
    for found in (found for pair in watched for found in pair):
        assert found.sharded_after_evaluation
        before, after = found.losses
        assert abs(before - uniform) > 1
        assert after == pytest.approx(uniform, rel=1e-12)
