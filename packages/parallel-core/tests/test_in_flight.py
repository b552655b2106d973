"""What is in flight is what the schedule's order says, and what autograd really keeps."""

from functools import cache

import pytest
import torch
from torch import nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from fivefold.parallel_core.activations import ActivationLedger
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.in_flight import (
    ChunkBytes,
    most_in_flight,
    peak_bytes,
    schedule_orders,
)
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.pipeline_config import ONE_STAGE, SCHEDULES, PipelineConfig
from fivefold.parallel_core.stage import border

from .gpt import A, B, H, S
from .gpt_stages import Pipeline, V, config_of, layers_of, part_of

BLOCK = B * S * H * (16 * 8 + 2) + A * S * S * B * (2 * 8 + 1) + B * S * 4 * 8
"""A block's bytes in float64: the paper's terms with 8 for 2, and the norms' statistics."""

# ---- pure ----------------------------------------------------------------------------------


def counts(config: PipelineConfig, num_ranks: int, num_microbatches: int) -> list[int]:
    orders = schedule_orders(config, num_ranks, num_microbatches)
    assert list(orders) == list(range(num_ranks))
    return [most_in_flight(order) for order in orders.values()]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_each_rank_runs_each_microbatch_of_its_stages_once(schedule: str, num_ranks: int) -> None:
    config, count = config_of(schedule), 2 * num_ranks
    for rank, order in schedule_orders(config, num_ranks, count).items():
        chunks = {
            (config.stage_index(rank, part, num_ranks), microbatch)
            for part in range(config.stages_per_rank)
            for microbatch in range(count)
        }
        for kinds in ("F", "BI", "BW"):
            done = [(a.stage, a.microbatch) for a in order if a.kind in kinds]
            assert len(done) == len(chunks) and set(done) == chunks


@pytest.mark.parametrize("num_microbatches", [4, 5, 12])
def test_1f1b_holds_as_many_as_there_are_stages_from_here_on(num_microbatches: int) -> None:
    assert counts(PipelineConfig(), 4, num_microbatches) == [4, 3, 2, 1]
    assert counts(config_of("GPipe"), 4, num_microbatches) == [num_microbatches] * 4


def test_interleaving_holds_the_papers_factor() -> None:
    """Section 4.2.3: L (1 + (p - 1) / (p m)) layers on rank 0, chunks of L / (p m)."""
    assert counts(config_of("Interleaved1F1B"), 4, 8) == [11, 9, 7, 5]
    for num_ranks, stages in ((8, 3), (35, 3)):
        config = PipelineConfig(schedule="Interleaved1F1B", stages_per_rank=stages)
        first = counts(config, num_ranks, 2 * num_ranks)[0]
        assert first == num_ranks * (stages + 1) - 1
        assert first == num_ranks * stages * (1 + (num_ranks - 1) / (num_ranks * stages))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_split_and_v_shaped_schedules(num_ranks: int) -> None:
    count = 2 * num_ranks
    assert counts(config_of("DualPipeV"), num_ranks, count) == [2 * num_ranks + 1] * num_ranks
    assert counts(config_of("ZBVZeroBubble"), num_ranks, count) == [2 * num_ranks] * num_ranks
    assert counts(config_of("LoopedBFS"), num_ranks, count) == [2 * count] * num_ranks


def test_what_the_weights_wait_for_weighs_less() -> None:
    order = schedule_orders(config_of("InterleavedZeroBubble"), 2, 4)[1]
    full = peak_bytes(order, dict.fromkeys((1, 3), ChunkBytes(forward=10, after_input=10)))
    less = peak_bytes(order, dict.fromkeys((1, 3), ChunkBytes(forward=10, after_input=4)))
    assert full == 10 * most_in_flight(order)
    assert 10 <= less < full


def test_a_schedule_that_cannot_run_has_no_order() -> None:
    with pytest.raises(ConfigError, match="needs at least 4 microbatches in a step, found 3"):
        schedule_orders(PipelineConfig(), 4, 3)


# ---- against autograd ----------------------------------------------------------------------


@cache
def chunk_bytes(stage: int, num_stages: int) -> ChunkBytes:
    """What one process keeps of one microbatch of a stage, after each part of its backward."""
    part = part_of(stage, num_stages)
    first, last = stage == 0, stage == num_stages - 1
    ids = torch.randint(0, V, (B, S))
    x = ids if first else torch.randn(B, S, H, dtype=torch.float64, requires_grad=True)
    root = nn.ModuleList([part])
    with ActivationLedger(root) as ledger:
        out = part(x if first else border(x))
        out = part.loss(out, ids) * 0.5 if last else border(out)
        found = named_bytes(stage, num_stages)
        assert sum(found.values()) == sum(ledger.terms().values()), ledger.report()
        forward = ledger.live
        if first:
            return ChunkBytes(forward=forward, after_input=forward)
        grads = None if last else [torch.randn_like(out)]
        _, groups = stage_backward_input([out], grads, [x], part.parameters())
        after_input = ledger.live
        stage_backward_weight(part.parameters(), groups)
        del groups, out
        assert ledger.live == 0
    return ChunkBytes(forward=forward, after_input=after_input)


def named_bytes(stage: int, num_stages: int) -> dict[str, int]:
    """Closed form: layers, and what the ends of the pipeline add."""
    rows = B * S
    terms = {"layers": layers_of(num_stages) // num_stages * BLOCK}
    if stage == 0:
        terms["ids"] = 8 * rows
    if stage == num_stages - 1:
        terms |= {
            "final norm": 8 * rows * (H + 2),
            "head": 8 * rows * H,
            "log-probabilities": 8 * rows * V,
            "targets and their weight": 8 * rows + 8,
        }
    return terms


def test_the_inputs_backward_frees_what_lies_behind_the_last_weight() -> None:
    middle, last = chunk_bytes(1, 4), chunk_bytes(3, 4)
    # The dropout's mask behind the MLP; at the end, the loss.
    assert middle.forward - middle.after_input == B * S * H
    names = named_bytes(3, 4)
    assert last.forward - last.after_input == (
        names["log-probabilities"] + names["targets and their weight"]
    )


def peaks(num_ranks: int) -> dict[str, int]:
    """The ledger's peak on this rank in a step of every schedule."""
    found = {}
    for schedule in SCHEDULES:
        pipeline = Pipeline(config_of(schedule), num_ranks, 2 * num_ranks)
        with ActivationLedger(nn.ModuleList(pipeline.parts)) as ledger:
            pipeline.step()
        assert ledger.live == 0
        found[schedule] = ledger.peak
    return found


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_peak_of_a_real_step_is_what_the_order_says(num_ranks: int) -> None:
    ranks = launch(peaks, num_ranks, num_ranks, timeout=300)
    for schedule in SCHEDULES:
        num_stages = num_ranks * config_of(schedule).stages_per_rank
        sizes = {stage: chunk_bytes(stage, num_stages) for stage in range(num_stages)}
        orders = schedule_orders(config_of(schedule), num_ranks, 2 * num_ranks)
        assert [found[schedule] for found in ranks] == [
            peak_bytes(orders[rank], sizes) for rank in range(num_ranks)
        ], schedule
        if schedule in ONE_STAGE:
            for rank, found in enumerate(ranks):
                chunks = most_in_flight(orders[rank])
                assert found[schedule] == chunks * sizes[rank].forward
