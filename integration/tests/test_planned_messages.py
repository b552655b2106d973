"""Plans that the planner's search returns run, and send what it says: calls and bytes are equal.

Toy decoders with experts, whose routing is even because every expert is padded to its capacity.
"""

from dataclasses import asdict
from typing import Any

import torch

from fivefold.moe import MoEConfig, MoEForCausalLM, sharding
from fivefold.moe.capacity_config import CapacityConfig
from fivefold.parallel_core import CommLedger, Topology, launch
from fivefold.parallel_core.build import build, make_runner
from fivefold.parallel_core.config import replace
from fivefold.parallel_core.data_parallel import Precision
from fivefold.parallel_core.planner.auto import shape_of
from fivefold.parallel_core.planner.hardware import hardware
from fivefold.parallel_core.planner.jobs import Job
from fivefold.parallel_core.planner.search import search
from fivefold.parallel_core.planner.setup import Setup
from fivefold.parallel_core.planner.step_traffic import step_traffic

WORLD, LENGTH, BATCH = 4, 16, 8
DOUBLE = {"element_size": 8, "weight_size": 8, "gradient_size": 8}
MODEL = MoEConfig(
    vocab_size=40,
    hidden_size=16,
    num_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    expert_intermediate_size=16,
    num_experts=8,
    num_experts_per_token=2,
    capacity=CapacityConfig(factor=1.0, pad=True),
)
Entries = dict[tuple[str, str], tuple[float, float]]


def planned(count: int) -> list[Setup]:
    """So many of the plans that a search returns, evenly from the fastest to the slowest."""
    job = Job(
        model=shape_of(MODEL.to_dict()),
        world_size=WORLD,
        length=LENGTH,
        global_batch=BATCH,
        most_parts=2,
    )
    plans = search(job, hardware("h100")).plans
    return [plans[i * len(plans) // count].setup for i in range(count)]


def measured(setups: list[Setup]) -> list[Entries]:
    """What this rank sends in a step of each."""
    return [_measure(setup) for setup in setups]


def _measure(setup: Setup) -> Entries:
    topology = Topology(setup.layout)
    model = build(
        lambda: MoEForCausalLM(MODEL),
        topology,
        sharding.plan(MODEL),
        head=sharding.HEAD,
        tail=sharding.TAIL,
        pipeline=setup.pipeline,
        precision=Precision(parameters="float64", compute="float64"),
        data_parallel=setup.data,
        regions=setup.recompute,
    )
    model.initialise(model.parts[0].initialisation, 1)
    runner = make_runner(
        model,
        setup.pipeline,
        num_microbatches=setup.num_microbatches,
        microbatch_size=setup.microbatch,
        sequence_length=LENGTH,
        hidden_size=MODEL.hidden_size,
        vocab_size=MODEL.vocab_size,
        dtype=torch.float64,
    )
    rows = BATCH // setup.dp, LENGTH // setup.cp
    ids = torch.zeros(rows, dtype=torch.long)
    model.weigh_side_losses(1 / BATCH)
    with CommLedger(topology) as ledger:
        runner.train(ids, ids, 1.0)
    return {key: (entry.calls, entry.bytes) for key, entry in ledger.entries.items()}


def test_plans_run_and_send_what_they_say() -> None:
    setups = planned(8)
    assert len({str(asdict(setup)) for setup in setups}) == 8
    for rank, entries in enumerate(launch(measured, WORLD, setups)):
        for setup, found in zip(setups, entries, strict=True):
            assert found == _expected(setup, rank), (rank, setup)


def _expected(setup: Setup, rank: int) -> dict[Any, Any]:
    exact = replace(setup, **DOUBLE)
    traffic = step_traffic(shape_of(MODEL.to_dict()), exact, rank // (WORLD // setup.pp))
    return {key: tuple(sent) for key, sent in traffic.items()}
