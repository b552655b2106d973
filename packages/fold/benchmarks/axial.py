"""What a rank keeps and sends where 1, 2, 4 and 8 ranks share a sample.

``python packages/fold/benchmarks/axial.py`` writes ``axial.json`` beside itself. One training step
without recycling or recomputation of a network of AlphaFold's widths with one block in each stack,
in float32, on random features. Memory and bytes are what they are; no time is measured, because the
ranks share one machine's cores.
"""

import argparse
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fivefold.fold.axial.traffic import block_traffic, pair_traffic
from fivefold.fold.config import AlphaFoldConfig
from fivefold.fold.model.alphafold import AlphaFold
from fivefold.fold.presets import preset
from fivefold.fold.sharding import AXIS, plan
from fivefold.parallel_core import ActivationLedger, CommLedger, Layout, Topology, launch
from fivefold.parallel_core.plan import parallelize

HERE = Path(__file__).resolve().parent
STACKS = ("template_pair_stack", "extra_msa_stack", "evoformer")
SIZES = {"residues": 128, "sequences": 62, "extra_sequences": 128, "templates": 2}


def network() -> AlphaFoldConfig:
    """AlphaFold's widths, one block in each stack."""
    model = preset("model_1").model
    template = replace(model.template, stack=replace(model.template.stack, num_blocks=1))
    return replace(
        model,
        template=template,
        extra_msa=replace(model.extra_msa, num_blocks=1),
        evoformer=replace(model.evoformer, num_blocks=1),
    )


def features() -> dict[str, Tensor]:
    """Random ones."""
    draw = torch.Generator().manual_seed(0)
    n, s, e, t = SIZES.values()

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    def classes(*shape: int) -> Tensor:
        return torch.randint(20, shape, generator=draw)

    return {
        "aatype": classes(n),
        "residue_index": torch.arange(n),
        "seq_mask": torch.ones(n),
        "target_feat": normal(n, 22),
        "msa_feat": normal(s, n, 49),
        "msa_mask": torch.ones(s, n),
        "extra_msa": classes(e, n),
        "extra_has_deletion": torch.zeros(e, n),
        "extra_deletion_value": torch.zeros(e, n),
        "extra_msa_mask": torch.ones(e, n),
        "template_mask": torch.ones(t),
        "template_aatype": classes(t, n),
        "template_all_atom_positions": 10 * normal(t, n, 37, 3),
        "template_all_atom_masks": torch.ones(t, n, 37),
        "template_pseudo_beta": 10 * normal(t, n, 3),
        "template_pseudo_beta_mask": torch.ones(t, n),
    }


def resident(what: str) -> float:
    """MiB of this process: "VmRSS" now, or "VmHWM" at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {what}")


def loss_of(outputs: dict[str, Any]) -> Tensor:
    """Something that depends on everything."""
    representations = outputs["representations"]
    positions = outputs["structure_module"]["final_atom_positions"]
    ends = (representations["pair"], representations["msa"], positions)
    return torch.stack([each.square().mean() for each in ends]).sum()


def step() -> dict[str, Any]:
    """A step of this rank: MiB kept and resident, MB sent."""
    topology = Topology(Layout(dist.get_world_size(), tp=dist.get_world_size()))
    torch.manual_seed(0)
    model, inputs = AlphaFold(network()).train(), features()
    parallelize(model, topology, plan(model.config))
    before = resident("VmRSS")
    with CommLedger(topology) as sent:
        loss_of(model(inputs)).backward()
    peak = resident("VmHWM") - before
    model.zero_grad()
    with ActivationLedger(model) as ledger:
        loss = loss_of(model(inputs))
        kept: dict[str, float] = defaultdict(float)
        for term, nbytes in ledger.terms().items():
            kept["stacks" if term.startswith(STACKS) else "elsewhere"] += nbytes / 2**20
    del loss
    return {
        "kept_in_stacks_mib": kept["stacks"],
        "kept_elsewhere_mib": kept["elsewhere"],
        "peak_resident_mib": peak,
        "sent_mb": {kind: entry.bytes / 1e6 for (kind, _), entry in sorted(sent.entries.items())},
    }


def blocks_mb(size: int) -> dict[str, float]:
    """MB that the formula says for one pass through the three blocks, on the first rank."""
    model, (n, s, e, t) = network(), SIZES.values()
    place = {"num_residues": n, "num_ranks": size}
    blocks = [
        block_traffic(model.evoformer, model.c_m, model.c_z, num_sequences=s + t, **place),
        block_traffic(model.extra_msa, model.c_e, model.c_z, num_sequences=e, **place),
        pair_traffic(model.template.stack, model.template.c_pair, **place) * t,
    ]
    return {
        "all_to_all": 4e-6 * sum(block.all_to_all for block in blocks),
        "all_gather": 4e-6 * sum(block.all_gather for block in blocks),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--json", type=Path, default=HERE / "axial.json")
    options = parser.parse_args()
    runs = []
    for size in options.sizes:
        runs.append({"dap": size, **launch(step, size)[0], "blocks_mb_a_pass": blocks_mb(size)})
        print(json.dumps(runs[-1]))
    found = {"axis": AXIS, "shape": SIZES, "torch": torch.__version__, "runs": runs}
    options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
