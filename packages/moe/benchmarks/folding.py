"""What folding saves: bytes between nodes and step time of coupled and folded mappings, 8 ranks.

    python packages/moe/benchmarks/folding.py --output packages/moe/benchmarks/folding.json

A mapping is coupled where experts take the tensor parallelism of attention and are spread over its
data-parallel ranks, as before MoE Parallel Folding (arXiv 2504.14960, section 3.1), and folded
where expert parallelism goes over any ranks, here those of a node. Nodes are ranks 0 to 3 and 4 to
7.
Every expert gets as many tokens, so what dispatchers must send is known: the ledger is held to it.
Mappings take turns, step by step; what counts is the fastest, of the slowest rank. All ranks share
one machine's cores, so its times have no slow link between nodes in them: bytes do.
"""

import argparse
import json
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fivefold.moe import MoEConfig, MoEForCausalLM, sharding
from fivefold.moe.dispatchers import DispatchConfig
from fivefold.moe.replay import replay_routing
from fivefold.moe.router_config import RouterConfig
from fivefold.parallel_core import CommLedger, Layout, Topology, launch
from fivefold.parallel_core.build import ParallelModel, build, make_runner
from fivefold.parallel_core.context import take_held
from fivefold.parallel_core.data_parallel import Precision
from fivefold.parallel_core.gradients import sum_partial
from fivefold.parallel_core.pipeline import Runner
from fivefold.parallel_core.pipeline_config import PipelineConfig
from fivefold.parallel_core.sequence_split import ContextConfig

WORLD, NODE, BATCH, LENGTH = 8, 4, 8, 256
MODEL = MoEConfig(
    vocab_size=1024,
    hidden_size=256,
    num_layers=2,
    num_attention_heads=8,
    expert_intermediate_size=512,
    num_experts=8,
    num_experts_per_token=2,
    router=RouterConfig(aux_loss_coef=0.0),
)
FLOAT32 = Precision(compute="float32")
# In the coupled order data parallelism, and with it EP, has the largest strides; it is what expert
# parallelism inside data parallelism means. Pairs hold the same number of experts on a rank.
COUPLED, FOLDED = "tp-cp-dp-ep-pp", "tp-cp-ep-dp-pp"
PAIRS: dict[str, dict[str, dict[str, Any]]] = {
    "TP2 CP2 DP2": {
        "coupled": {"tp": 2, "cp": 2, "etp": 2, "ep": 2, "order": COUPLED},
        "folded": {"tp": 2, "cp": 2, "ep": 4, "order": FOLDED},
    },
    "TP4 DP2": {
        "coupled": {"tp": 4, "etp": 4, "ep": 2, "order": COUPLED},
        "folded": {"tp": 4, "ep": 8, "order": FOLDED},
    },
    "CP4 DP2": {
        "coupled": {"cp": 4, "ep": 2, "order": COUPLED},
        "folded": {"cp": 4, "ep": 2, "order": FOLDED},
    },
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model laid over this rank's world, with its part of the batch and of the routing."""

    topology: Topology
    model: ParallelModel
    runner: Runner
    data: list[torch.Tensor]
    choices: dict[int, list[torch.Tensor]]

    def step(self) -> None:
        """Forward, backward and the sum of gradients over replicas."""
        for part in self.model.parts:
            part.zero_grad()
        with replay_routing(self.model.parts[0], self.choices):
            inputs, targets = self.data
            self.runner.train(inputs, targets, 1 / (BATCH * LENGTH))
        sum_partial(self.model.pieces(), self.topology)


def make_job(degrees: dict[str, Any]) -> Job:
    """Build and initialise on this rank."""
    topology = Topology(Layout(WORLD, **degrees))
    layout, context = topology.layout, ContextConfig()
    sharding.check(MODEL, layout, LENGTH, context)
    model = build(
        lambda: MoEForCausalLM(MODEL),
        topology,
        sharding.plan(MODEL, context, DispatchConfig()),
        head=sharding.HEAD,
        tail=sharding.TAIL,
        precision=FLOAT32,
    )
    model.initialise(model.parts[0].initialisation, 0)
    sequences = BATCH // layout.dp
    runner = make_runner(
        model,
        PipelineConfig(),
        num_microbatches=1,
        microbatch_size=sequences,
        sequence_length=LENGTH,
        hidden_size=MODEL.hidden_size,
        vocab_size=MODEL.vocab_size,
        dtype=FLOAT32.compute_dtype,
    )
    whole = torch.randint(MODEL.vocab_size, (2, BATCH, LENGTH))
    mine = whole.chunk(layout.dp, dim=1)[topology.rank("dp")]
    data = [take_held(rows, topology.axis("cp"), context.split) for rows in mine]
    positions = LENGTH // layout.cp // layout.tp
    balanced = torch.arange(sequences * positions * MODEL.num_experts_per_token)
    chosen = balanced.remainder(MODEL.num_experts).view(sequences, positions, -1)
    choices = {i: [chosen] for i in range(MODEL.num_layers)}
    return Job(topology=topology, model=model, runner=runner, data=data, choices=choices)


def expected_dispatch(layout: Layout) -> float:
    """Bytes that one rank sends to bring tokens to balanced experts and back, in a step.

    Four times a layer, out and home, forward and backward: the copies of its n tokens for other
    ranks of EP, and those that came, for each other rank of ETP.
    """
    tokens = BATCH * LENGTH // WORLD
    copies = tokens * MODEL.num_experts_per_token * MODEL.hidden_size * 4
    a_layer = 4 * copies * ((layout.ep - 1) / layout.ep + (layout.etp - 1))
    return MODEL.num_layers * a_layer


def count(job: Job) -> dict[str, Any]:
    """Bytes of one step that this rank sends, and what of them leaves its node."""
    with CommLedger(job.topology, ranks_per_node=NODE) as ledger:
        job.step()
    dispatch = [
        entry
        for (name, axis), entry in ledger.entries.items()
        if name == "all_to_all" and axis in ("ep", "etp")
    ]
    return {
        "dispatch": sum(entry.bytes for entry in dispatch),
        "dispatch_between_nodes": sum(entry.bytes_between_nodes for entry in dispatch),
        "all": sum(entry.bytes for entry in ledger.entries.values()),
        "all_between_nodes": sum(entry.bytes_between_nodes for entry in ledger.entries.values()),
    }


def measure(repeats: int) -> tuple[dict[str, dict[str, Any]], dict[str, list[float]]]:
    """Bytes and times of every mapping, as this rank finds them."""
    torch.manual_seed(0)
    jobs = {
        f"{attention}, {kind}": make_job(degrees)
        for attention, pair in PAIRS.items()
        for kind, degrees in pair.items()
    }
    sent = {name: count(job) for name, job in jobs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            dist.barrier()
            start = time.perf_counter()
            job.step()
            seconds[name].append(time.perf_counter() - start)
    return sent, seconds


def summarise(found: list[tuple[dict[str, Any], dict[str, list[float]]]]) -> list[dict[str, Any]]:
    """One row a mapping: bytes of all ranks, and the fastest step of the slowest rank."""
    rows = []
    for attention, pair in PAIRS.items():
        for kind, degrees in pair.items():
            name, layout = f"{attention}, {kind}", Layout(WORLD, **degrees)
            sent = {key: sum(each[0][name][key] for each in found) for key in found[0][0][name]}
            wanted = WORLD * expected_dispatch(layout)
            if sent["dispatch"] != wanted:
                raise SystemExit(
                    f"{name}: {sent['dispatch']} bytes sent, the formula says {wanted}"
                )
            slowest = [max(steps) for steps in zip(*(each[1][name] for each in found), strict=True)]
            rows.append(
                {
                    "attention": attention,
                    "experts": f"ETP{layout.etp} EP{layout.ep} EDP{layout.edp}",
                    "kind": kind,
                    "order": layout.order,
                    "bytes": sent,
                    "seconds_min": min(slowest),
                    "seconds": slowest,
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The table of the README: MiB of all ranks in a step, and time."""
    lines = [
        "| attention | experts | | dispatch | of it between nodes | all between nodes | step |",
        "|---|---|---|---|---|---|---|",
    ]
    first = {row["attention"]: row["seconds_min"] for row in reversed(rows)}
    for row in rows:
        sizes = [
            f"{row['bytes'][key] / 2**20:.1f}"
            for key in ("dispatch", "dispatch_between_nodes", "all_between_nodes")
        ]
        relative = row["seconds_min"] / first[row["attention"]]
        cells = [row["attention"], row["experts"], row["kind"], *sizes, f"{relative:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def pays_from(rows: list[dict[str, Any]]) -> list[str]:
    """From how many tokens a step a folded mapping sends less between nodes than its coupled one.

    What each microbatch sends grows with the tokens of a step; gradients are summed once.
    """
    lines = []
    for coupled, folded in zip(rows[::2], rows[1::2], strict=True):
        of_tokens, once = (
            [row["bytes"][f"{kind}_between_nodes"] for row in (coupled, folded)]
            for kind in ("dispatch", "all")
        )
        saved = of_tokens[0] - of_tokens[1]
        more = (once[1] - of_tokens[1]) - (once[0] - of_tokens[0])
        if saved > 0:
            tokens = max(more, 0) / saved * BATCH * LENGTH
            lines.append(f"{coupled['attention']}: from {tokens:,.0f} tokens a step")
    return lines


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--repeats", type=int, default=10, help="steps of each mapping (10)")
    options = parser.parse_args()
    rows = summarise(launch(measure, WORLD, options.repeats, timeout=600))
    print(table(rows), *pays_from(rows), sep="\n")
    if options.output:
        machine = {"cpu": platform.processor() or platform.machine(), "torch": version("torch")}
        figures = {"machine": machine, "model": MODEL.to_dict(), "rows": rows}
        options.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
