"""Plans that the planner's search returns, run at toy width on forked ranks.

For every plan and rank what the run keeps and sends is set beside what the plan says: bytes of
activations at their peak (``ActivationLedger``), of weights and of what the optimizer keeps, and
calls and bytes of every collective on every axis (``CommLedger``). Routing is even, because every
expert is padded to its capacity; precision is mixed, bfloat16 over float32.

    python packages/moe/benchmarks/planned_runs.py --plans 20 --json planned_runs.json
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fivefold.moe import MoEConfig, MoEForCausalLM, sharding
from fivefold.moe.capacity_config import CapacityConfig
from fivefold.parallel_core import ActivationLedger, CommLedger, Topology, launch
from fivefold.parallel_core.build import ParallelModel, build, make_runner
from fivefold.parallel_core.data_parallel import Precision
from fivefold.parallel_core.data_parallel_config import WHOLE
from fivefold.parallel_core.files import write_json
from fivefold.parallel_core.planner.auto import shape_of
from fivefold.parallel_core.planner.hardware import hardware
from fivefold.parallel_core.planner.jobs import Job
from fivefold.parallel_core.planner.memory import stage_memory
from fivefold.parallel_core.planner.search import search
from fivefold.parallel_core.planner.setup import Setup, describe
from fivefold.parallel_core.planner.step_traffic import step_traffic
from fivefold.parallel_core.training.optimizer import AdamWConfig, ShardedAdamW

WORLD, LENGTH, BATCH = 4, 16, 8
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
MIXED = Precision(parameters="float32", compute="bfloat16")
Found = dict[str, Any]


def planned(count: int) -> list[Setup]:
    """So many of the plans that a search returns, evenly from the fastest to the slowest."""
    job = Job(
        model=shape_of(MODEL.to_dict()),
        world_size=WORLD,
        length=LENGTH,
        global_batch=BATCH,
        most_parts=2,
        forms=("replicate", "zero1", "zero2", "zero3"),
    )
    plans = search(job, hardware("h100")).plans
    return [plans[i * len(plans) // count].setup for i in range(count)]


def said(setup: Setup, rank: int) -> Found:
    """What the plan says of a rank."""
    shape, stage = shape_of(MODEL.to_dict()), rank // (WORLD // setup.pp)
    terms = stage_memory(shape, setup, stage).terms

    def of(*names: str) -> int:
        return sum(terms.get(name, 0) for name in names)

    sent = step_traffic(shape, setup, stage).items()
    return {
        "activations": of("layers", "embedding", "head"),
        "weights": of("dense.weights", "experts.weights"),
        "optimizer": of("dense.optimizer", "experts.optimizer"),
        "messages": {f"{name} {axis}": list(entry) for (name, axis), entry in sorted(sent)},
    }


def measured(setups: Sequence[Setup]) -> list[Found]:
    """What this rank keeps and sends in a step of each."""
    return [_measure(setup) for setup in setups]


def _measure(setup: Setup) -> Found:
    topology = Topology(setup.layout)
    model = _build(setup, topology)
    optimizer = ShardedAdamW(model.pieces(), AdamWConfig())
    runner = make_runner(
        model,
        setup.pipeline,
        num_microbatches=setup.num_microbatches,
        microbatch_size=setup.microbatch,
        sequence_length=LENGTH,
        hidden_size=MODEL.hidden_size,
        vocab_size=MODEL.vocab_size,
        dtype=torch.bfloat16,
    )
    ids = torch.zeros((BATCH // setup.dp, LENGTH // setup.cp), dtype=torch.long)
    model.weigh_side_losses(1 / BATCH)
    parts = nn.ModuleList(model.parts)
    with ActivationLedger(parts) as kept, CommLedger(topology) as ledger:
        runner.train(ids, ids, 1.0)
    sent = sorted(ledger.entries.items())
    mains = {piece.name: piece.local for piece in model.pieces()}
    weights = parts.parameters() if setup.data.form in WHOLE else ()
    return {
        "activations": kept.peak,
        "weights": _bytes(weights),
        "optimizer": _bytes(mains.values())
        + _bytes(part.tensor for part in optimizer.parts().values()),
        "messages": {f"{name} {axis}": [e.calls, e.bytes] for (name, axis), e in sent},
    }


def _build(setup: Setup, topology: Topology) -> ParallelModel:
    model = build(
        lambda: MoEForCausalLM(MODEL),
        topology,
        sharding.plan(MODEL),
        head=sharding.HEAD,
        tail=sharding.TAIL,
        pipeline=setup.pipeline,
        precision=MIXED,
        data_parallel=setup.data,
        regions=setup.recompute,
    )
    model.initialise(model.parts[0].initialisation, 1)
    return model


def _bytes(tensors: Any) -> int:
    found: list[Tensor] = list(tensors)
    return sum(tensor.numel() * tensor.element_size() for tensor in found)


def run(count: int) -> list[Found]:
    """Run so many plans; what was said and measured of each rank, and whether they are equal."""
    setups = planned(count)
    ranks = launch(measured, WORLD, setups)
    results = []
    for index, setup in enumerate(setups):
        found = [of_rank[index] for of_rank in ranks]
        plan = [said(setup, rank) for rank in range(WORLD)]
        result = {"plan": describe(setup), "equal": found == plan, "measured": found}
        results.append(result | ({} if found == plan else {"said": plan}))
    return results


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = run(options.plans)
    for result in results:
        print("equal " if result["equal"] else "DIFFER", result["plan"])
    if options.json:
        about = {"world_size": WORLD, "length": LENGTH, "global_batch": BATCH}
        write_json(options.json, about | {"model": MODEL.to_dict(), "plans": results})


if __name__ == "__main__":
    main()
