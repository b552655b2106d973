"""Ranks that share samples train as one process does, and every parameter has its place."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from axial_job import LOSS, Step, cycles, distances, network, step
from fold_network import tiny_config
from torch import Tensor

from fivefold.fold.model.alphafold import AlphaFold
from fivefold.fold.sharding import plan
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.plan import check_plan, parallelize
from fivefold.parallel_core.topology import Topology

Samples = list[list[dict[str, Tensor]]]

# What shifts all scores of a softmax alike changes nothing: the gradient is rounding alone.
WITHOUT_EFFECT = ("msa_row_attention.layer_norm_z.bias", "ipa.linear_b.bias")


@pytest.mark.parametrize("changes", [{}, {"template": None}])
def test_every_parameter_is_placed_whole(changes: dict[str, Any]) -> None:
    config = tiny_config(**changes)
    model = AlphaFold(config)
    check_plan(model, plan(config))
    table = parallelize(model, Topology.local(), plan(config))
    assert set(table) == {name for name, _ in model.named_parameters()}
    assert all(not table[name].sharded and not table[name].partial for name in table)


def samples(structure: Mapping[str, Tensor], dtype: torch.dtype, masked: bool) -> Samples:
    return [cycles(structure, 10 * number, dtype, masked) for number in range(2)]


def _on_ranks(of: Samples, size: int, **options: Any) -> Step:
    return step(network(), of, Topology(Layout(dist.get_world_size(), tp=size)), **options)


# The second has data parallelism over pairs that share a sample.
@pytest.mark.parametrize(
    ("world", "size", "masked", "recompute"),
    [(4, 4, True, "none"), (4, 2, False, "full"), (2, 2, True, "none")],
)
def test_outputs_and_all_gradients_are_those_of_one_process(
    structure: dict[str, Tensor], world: int, size: int, masked: bool, recompute: str
) -> None:
    of = samples(structure, torch.float64, masked)
    plain = step(network(), of, Topology.local())
    zero = {name for name in plain.gradients if name.endswith(WITHOUT_EFFECT)}
    assert len(zero) == 5
    seen, rank = set(), partial(_on_ranks, of, size, recompute=recompute)
    for found in launch(rank, world, timeout=300):
        assert found.gradients.keys() == plain.gradients.keys()
        seen |= found.outputs.keys()
        errors = distances(found.outputs, plain.outputs)
        errors |= distances(found.gradients, plain.gradients)
        assert max(error for name, error in errors.items() if name not in zero) < 1e-12
        values = [each.gradients[name] for each in (found, plain) for name in zero]
        assert max(float(value.abs().max()) for value in values) < 1e-14
    assert seen == plain.outputs.keys()


def test_float32_agrees_to_its_rounding(structure: dict[str, Tensor]) -> None:
    of = samples(structure, torch.float32, True)
    # Violations are hinges that turn rounding into steps.
    options = {"dtype": torch.float32, "loss": replace(LOSS, violation=0.0)}
    plain = step(network(), of, Topology.local(), **options)
    for found in launch(partial(_on_ranks, of, 2, **options), 2, timeout=300):
        for name, value in plain.outputs.items():
            assert (found.outputs[name] - value).norm() <= 1e-6 * value.norm(), name
        pairs = [(found.gradients[name], value) for name, value in plain.gradients.items()]
        error = torch.cat([(a - b).flatten() for a, b in pairs]).norm()
        assert error < 1e-6 * torch.cat([b.flatten() for _, b in pairs]).norm()


def _placements() -> tuple[set[str], int]:
    topology, config = Topology(Layout(2, tp=2)), tiny_config()
    table = parallelize(AlphaFold(config), topology, plan(config))
    partial = {name.split(".")[0] for name in table if table[name].partial == ("tp",)}
    others = [name for name in table if table[name].partial not in ((), ("tp",))]
    return partial, len(others)


def test_the_table_says_which_gradients_are_parts() -> None:
    stacks = {"template_pair_stack", "extra_msa_stack", "evoformer"}
    assert launch(_placements, 2, timeout=60) == [(stacks, 0)] * 2


def test_a_plan_of_another_module_is_refused() -> None:
    config = tiny_config()
    lines = dict(plan(config))
    lines["evoformer.leave"] = lines["evoformer.blocks.*"]
    with pytest.raises(ConfigError, match=r"'evoformer\.leave' needs a EvoformerBlock"):
        parallelize(AlphaFold(config), Topology.local(), lines)
