"""The narrowest network with everything, trained one step on ranks that share samples.

30 residues and 13 rows of the main MSA (11 sequences, 2 templates) divide over neither 4 ranks nor
8; of 3 extra sequences one of 4 ranks has none. Dropout is on, and there are 3 recycles.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from fold_network import alphafold_arrays, tiny_config
from torch import Tensor

from fivefold.fold.config import AlphaFoldConfig, LossConfig
from fivefold.fold.geometry.ground_truth import supervised_features
from fivefold.fold.losses.total import alphafold_loss
from fivefold.fold.model.alphafold import AlphaFold
from fivefold.fold.params.convert import from_alphafold
from fivefold.fold.params.names import table
from fivefold.fold.sharding import plan
from fivefold.parallel_core.data_parallel import reduce_gradients
from fivefold.parallel_core.data_parallel_config import DataParallelConfig
from fivefold.parallel_core.gradients import sum_partial
from fivefold.parallel_core.plan import parallelize
from fivefold.parallel_core.precision import Precision
from fivefold.parallel_core.topology import Topology

NUM_RESIDUES, NUM_CLUSTERS, NUM_EXTRA, NUM_RECYCLES = 30, 11, 3, 3
LOSS = LossConfig(violation=0.1, experimentally_resolved=0.01, aligned_error=0.1)


def network(**changes: Any) -> AlphaFoldConfig:
    """Two blocks of each stack, and dropout."""
    tiny = tiny_config()
    stack = replace(tiny.evoformer, num_blocks=2, msa_dropout=0.15, pair_dropout=0.25)
    template = replace(tiny.template, stack=replace(tiny.template.stack, **_twice(stack)))
    return replace(tiny, evoformer=stack, extra_msa=stack, template=template, **changes)


def _twice(stack: Any) -> dict[str, Any]:
    return {"num_blocks": stack.num_blocks, "pair_dropout": stack.pair_dropout}


def model_of(config: AlphaFoldConfig, dtype: torch.dtype) -> AlphaFold:
    """A network with parameters from seeds."""
    model = AlphaFold(config)
    model.load_state_dict(from_alphafold(alphafold_arrays(config), table(config)))
    return model.to(dtype).train()


def cycles(
    structure: Mapping[str, Tensor], seed: int, dtype: torch.dtype, masked: bool = True
) -> list[dict[str, Tensor]]:
    """Features of each iteration: the structure and its templates twice, and random alignments."""
    twice = {
        name: torch.cat((value, value), dim).narrow(dim, 0, NUM_RESIDUES)
        for name, value in structure.items()
        if value.dim() > (dim := int(name.startswith("template_")))
    }
    twice["template_mask"] = structure["template_mask"]
    twice["all_atom_positions"] = twice["all_atom_positions"].clone()
    twice["all_atom_positions"][16:] += torch.tensor([25.0, 5.0, -8.0])
    shared = twice | {"residue_index": torch.arange(NUM_RESIDUES)}
    made = []
    for cycle in range(NUM_RECYCLES + 1):
        found = shared | _alignment(seed + cycle, masked)
        found |= supervised_features(
            found["aatype"], found["all_atom_positions"], found["all_atom_mask"]
        )
        made.append({k: v.to(dtype) if v.is_floating_point() else v for k, v in found.items()})
    return made


def _alignment(seed: int, masked: bool) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    n, s, e = NUM_RESIDUES, NUM_CLUSTERS, NUM_EXTRA

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=draw)

    def mask(*shape: int) -> Tensor:
        kept = (uniform(*shape) > 0.2 * masked).float()
        kept[0] = kept[:, 0] = 1
        return kept

    aatype = torch.arange(n) % 20
    seq_mask = torch.ones(n)
    seq_mask[-1] = 1 - masked
    return {
        "aatype": aatype,
        "seq_mask": seq_mask,
        "target_feat": torch.cat((torch.zeros(n, 1), torch.eye(21)[aatype]), -1),
        "msa_feat": uniform(s, n, 49),
        "msa_mask": mask(s, n),
        "extra_msa": (23 * uniform(e, n)).long(),
        "extra_has_deletion": uniform(e, n).round(),
        "extra_deletion_value": uniform(e, n),
        "extra_msa_mask": mask(e, n),
        "true_msa": (22 * uniform(s, n)).long(),
        "bert_mask": uniform(s, n).round(),
        "resolution": torch.tensor(2.0),
        "use_clamped_fape": torch.tensor(1.0),
    }


@dataclass(frozen=True)
class Step:
    """What a step leaves.

    Attributes:
        outputs: of the last iteration of this rank's samples, by number and dotted name.
        gradients: of all parameters, summed over all samples.
    """

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]


def step(
    config: AlphaFoldConfig,
    samples: list[list[dict[str, Tensor]]],
    topology: Topology,
    *,
    dtype: torch.dtype = torch.float64,
    loss: LossConfig = LOSS,
    recompute: str = "none",
) -> Step:
    """A training step of this rank on its part of the samples."""
    model, axis = model_of(config, dtype), topology.axis("dp-cp")
    precision = Precision(parameters=str(dtype).split(".")[1], compute=str(dtype).split(".")[1])
    form = DataParallelConfig(form="replicate")
    placed = parallelize(
        model, topology, plan(config), precision, regions=recompute, data_parallel=form
    )
    outputs: dict[str, Tensor] = {}
    for number in range(axis.rank, len(samples), axis.size):
        torch.manual_seed(number)
        found = model(samples[number])
        alphafold_loss(found, samples[number][-1], loss)[0].backward()
        outputs |= {f"{number}.{name}": x.detach().clone() for name, x in _flat(found)}
    reduce_gradients(model)
    pieces = placed.pieces(model)
    sum_partial(pieces, topology)
    return Step(outputs, {p.name: p.grad.clone() for p in pieces if p.grad is not None})


def _flat(outputs: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in outputs.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")


def distances(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """How far each tensor is from what it should be, relative to its largest value."""
    return {
        name: float((found[name] - value).abs().max() / value.abs().max().clamp(min=1e-30))
        for name, value in expected.items()
        if name in found
    }
