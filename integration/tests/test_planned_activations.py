"""The planner's bytes are what autograd really keeps of this project's decoders, to equality.

Random shapes, mappings, dtypes and recomputation: grouped queries, gated MLPs, experts behind a
dispatcher (what its busiest rank gets is told to the planner as imbalance), Mamba-2 mixers.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from fivefold.hybrid_ssm import HybridForCausalLM
from fivefold.hybrid_ssm import sharding as hybrid_sharding
from fivefold.hybrid_ssm.config import HybridConfig
from fivefold.moe import MoEConfig, MoEForCausalLM
from fivefold.moe import sharding as moe_sharding
from fivefold.moe.capacity_config import CapacityConfig
from fivefold.parallel_core import ActivationLedger, Layout, Topology, launch
from fivefold.parallel_core.build import build
from fivefold.parallel_core.data_parallel import Precision
from fivefold.parallel_core.data_parallel_config import DataParallelConfig
from fivefold.parallel_core.pipeline_config import PipelineConfig
from fivefold.parallel_core.planner.activations import (
    first_terms,
    last_terms,
    layer_terms,
    stage_terms,
    target_bytes,
)
from fivefold.parallel_core.planner.auto import shape_of
from fivefold.parallel_core.planner.hybrids import hybrid_shape_of
from fivefold.parallel_core.planner.local import Local
from fivefold.parallel_core.planner.models import ModelShape
from fivefold.parallel_core.planner.parameters import ends_parameters, layer_parameters

NUM_CASES = 8
SIZES = {"float32": 4, "bfloat16": 2, "float64": 8}
MAPPINGS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4)]
TURNS = ("attention.cos", "attention.sin", "attention.to_copy")
"""Made where the first layer needs them, kept for all."""


@dataclass(frozen=True)
class Case:
    """A model and how it runs."""

    config: Any
    shape: ModelShape
    axes: dict[str, int]
    mode: Any
    dtype: str
    microbatch: int
    length: int

    def local(self, arrived: int | None) -> Local:
        axes, top_k = self.axes, self.shape.experts.top_k if self.shape.experts else 1
        copies = self.microbatch * self.length // (axes["cp"] * axes["tp"]) * top_k
        return Local(
            microbatch=self.microbatch,
            length=self.length,
            sequence=axes["tp"] > 1,
            element_size=SIZES[self.dtype],
            recompute=self.mode,
            imbalance=1.0 if arrived is None else arrived / (copies * axes["etp"]),
            **axes,
        )


@dataclass(frozen=True)
class Found:
    """What a rank kept: terms, rows at each layer's experts, parameters."""

    terms: dict[str, int]
    arrived: dict[str, int]
    parameters: int


def moe_case(seed: int, world_size: int) -> Case:
    chance = random.Random(seed)
    family = ("mixtral", "qwen2_moe", "qwen3_moe")[seed % 3]
    special: dict[str, Any] = {}
    if family == "qwen2_moe":
        special = {
            "shared_intermediate_size": 4 * chance.randint(2, 8),
            "shared_gate": True,
            "qkv_bias": True,
            "dense_layers": (0,),
            "intermediate_size": 4 * chance.randint(3, 9),
        }
    elif family == "qwen3_moe":
        special = {"qk_norm": True}
    padded = CapacityConfig(factor=chance.choice([1.0, 1.5]), pad=True)
    config = MoEConfig(
        model_type=family,
        vocab_size=4 * chance.randint(5, 20),
        hidden_size=4 * chance.randint(2, 8),
        num_layers=2,
        num_attention_heads=8,
        num_key_value_heads=chance.choice([4, 8]),
        head_dim=2 * chance.randint(2, 6),
        expert_intermediate_size=4 * chance.randint(2, 8),
        num_experts=8,
        num_experts_per_token=chance.randint(1, 3),
        capacity=chance.choice([padded, CapacityConfig()]),
        **special,
    )
    attention, experts = ((1, 1), (1, 1))
    if world_size == 4:
        attention, experts = chance.choice(MAPPINGS), chance.choice(MAPPINGS)
    axes = {"tp": attention[0], "cp": attention[1], "ep": experts[0], "etp": experts[1]}
    return _case(config, shape_of(config.to_dict()), axes, chance, tuple(SIZES))


def hybrid_case(seed: int, world_size: int) -> Case:
    chance = random.Random(seed)
    config = HybridConfig(
        vocab_size=4 * chance.randint(5, 20),
        hidden_size=4 * chance.randint(2, 8),
        pattern="M*-ME",
        num_mamba_heads=8,
        mamba_head_dim=chance.randint(2, 6),
        state_size=chance.randint(2, 9),
        num_groups=chance.choice([2, 4, 8]),
        intermediate_size=4 * chance.randint(2, 9),
        num_attention_heads=8,
        num_key_value_heads=chance.choice([4, 8]),
        head_dim=chance.randint(2, 6),
        num_experts=8,
        num_experts_per_token=chance.randint(1, 3),
        expert_intermediate_size=4 * chance.randint(2, 8),
        shared_intermediate_size=4 * chance.randint(2, 8),
        normalise_weights=chance.random() < 0.5,
    )
    tp, (ep, etp) = 1, (1, 1)
    if world_size == 4:
        tp, (ep, etp) = chance.choice([1, 2, 4]), chance.choice(MAPPINGS)
    axes = {"tp": tp, "cp": 1, "ep": ep, "etp": etp}
    dtypes = tuple(SIZES) if world_size == 1 else ("float32", "float64")
    return _case(config, hybrid_shape_of(config.to_dict()), axes, chance, dtypes)


def _case(
    config: Any,
    shape: ModelShape,
    axes: dict[str, int],
    chance: random.Random,
    dtypes: tuple[str, ...],
) -> Case:
    return Case(
        config=config,
        shape=shape,
        axes=axes,
        mode=chance.choice(["none", "selective", "full"]),
        dtype=chance.choice(dtypes),
        microbatch=chance.randint(1, 3),
        length=8 * chance.randint(1, 3),
    )


CASES: dict[str, tuple[Callable[[int, int], Case], Any, Any]] = {
    "moe": (moe_case, MoEForCausalLM, moe_sharding),
    "hybrid": (hybrid_case, HybridForCausalLM, hybrid_sharding),
}


def measured(kind: str, world_size: int) -> list[Found]:
    make, model, sharding = CASES[kind]
    cases = [make(seed, world_size) for seed in range(NUM_CASES)]
    return [_measure(case, model, sharding, world_size) for case in cases]


def _measure(case: Case, make: Any, sharding: Any, world_size: int) -> Found:
    topology = Topology(Layout(world_size, **case.axes)) if world_size > 1 else Topology.local()
    built = build(
        lambda: make(case.config),
        topology,
        sharding.plan(case.config),
        head=sharding.HEAD,
        tail=sharding.TAIL,
        pipeline=PipelineConfig(),
        precision=Precision(parameters=case.dtype, compute=case.dtype),  # type: ignore[arg-type]
        data_parallel=DataParallelConfig(form="replicate"),
        regions=case.mode,
    )
    model = built.parts[0]
    built.initialise(model.initialisation, 1)  # type: ignore[arg-type]
    arrived: dict[str, int] = {}
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(_row_counter(arrived, name.split(".")[1]))
    shape = (case.microbatch, case.length // case.axes["cp"])
    ids = torch.randint(0, case.config.vocab_size, shape)
    with ActivationLedger(model) as ledger:
        loss = model.loss(model(ids), ids)  # type: ignore[operator]
        terms = ledger.terms()
        assert loss.requires_grad
    return Found(terms, arrived, sum(p.numel() for p in model.parameters()))


def _row_counter(arrived: dict[str, int], layer: str) -> Callable[[nn.Module, Any], None]:
    def count(_: nn.Module, args: Any) -> None:
        arrived[layer] = len(args[0])

    return count


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("kind", CASES)
def test_every_layer_keeps_what_the_planner_says(kind: str, world_size: int) -> None:
    cases = [CASES[kind][0](seed, world_size) for seed in range(NUM_CASES)]
    for of_rank in launch(measured, world_size, kind, world_size):
        for case, found in zip(cases, of_rank, strict=True):
            _compare(case, found)


def _compare(case: Case, found: Found) -> None:
    shape, axes = case.shape, case.axes
    parts = (axes["tp"], axes["ep"], axes["etp"])
    count = sum(sum(layer_parameters(shape, letter, *parts)) for letter in shape.layers)
    assert found.parameters == count + ends_parameters(shape, axes["tp"], True, True)
    rest = dict(found.terms)
    for index, letter in enumerate(shape.layers):
        local = case.local(found.arrived.get(str(index)))
        names = [n for n in rest if n.startswith(f"layers.{index}.") and not n.endswith(TURNS)]
        kept = sum(rest.pop(name) for name in names)
        assert kept == sum(layer_terms(shape, local, letter).values()), (index, case)
    local = case.local(None)
    around = [*first_terms(shape, local).values(), *last_terms(shape, local).values()]
    around += stage_terms(shape, local, shape.layers).values()
    assert sum(rest.values()) == sum(around) + target_bytes(shape, local, 1), case
