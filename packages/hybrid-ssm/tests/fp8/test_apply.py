"""Which products become FP8, and training with it under plans and recomputation."""

from typing import Any

import pytest
import torch

from fivefold.hybrid_ssm import HybridConfig, HybridForCausalLM, fp8, sharding
from fivefold.hybrid_ssm.errors import HybridConfigError
from fivefold.hybrid_ssm.fp8.apply import chosen_products
from fivefold.hybrid_ssm.fp8.config import FP8Config
from fivefold.hybrid_ssm.train import initialise
from fivefold.parallel_core.build import build
from fivefold.parallel_core.data_parallel import Precision
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.pipeline import LocalRunner
from fivefold.parallel_core.topology import Topology

SIZES: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 16,
    "pattern": "M-ME*-",
    "num_mamba_heads": 4,
    "mamba_head_dim": 8,
    "state_size": 8,
    "num_groups": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_token": 2,
    "expert_intermediate_size": 8,
    "shared_intermediate_size": 8,
    "latent_size": 12,
    "aux_loss_coef": 0.0,
    "initializer_range": 0.3,
}
MODEL = HybridConfig(**SIZES)
IDS = torch.arange(4 * 8).view(4, 8) * 5 % 37


def short(names: tuple[str, ...]) -> list[str]:
    return [name.removeprefix("layers.").replace(".mixer.", ".") for name in names]


def test_layers_at_the_ends_stay() -> None:
    assert short(fp8.recipe(HybridForCausalLM(MODEL), first=2, last=1)) == [
        "2.in_proj", "2.out_proj", "3.shared.up_proj", "3.latent_in", "3.experts",
        "3.shared.down_proj", "3.latent_out", "4.qkv", "4.o_proj",
    ]  # fmt: skip


def test_products_at_the_ends_stay() -> None:
    model = HybridForCausalLM(MODEL)
    found = short(fp8.recipe(model, first=3, last=5, count="products", experts=False))
    assert found == ["1.down_proj", "2.in_proj", "2.out_proj", "3.shared.up_proj", "3.latent_in"]


def test_counts_of_the_paper() -> None:
    """56B: 118 layers without 8; by the introduction 236 products without 8."""
    pattern = "M-M-M-M*-" + "M-M-M-M-M*-" * 9 + "M-M-M-M-M-"
    config = HybridConfig(**(SIZES | {"pattern": pattern}))
    by_layer = chosen_products(config, FP8Config())
    assert sorted(by_layer) == list(range(4, 114)) and {len(p) for p in by_layer.values()} == {2}
    by_product = chosen_products(config, FP8Config(count="products"))
    assert sum(len(parts) for parts in by_product.values()) == 236 - 8


def test_nothing_else_changes() -> None:
    model = HybridForCausalLM(MODEL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reference = model(IDS)
    fp8.recipe(model, first=1, last=1)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    found, reference = model(IDS).detach(), reference.detach()
    assert 0 < float((found - reference).norm() / reference.norm()) < 0.15


def test_what_cannot_be() -> None:
    model = HybridForCausalLM(MODEL)
    with pytest.raises(HybridConfigError, match=r"first=3 and last=3 leave none of the 6 layers"):
        fp8.recipe(model, first=3, last=3)
    with pytest.raises(HybridConfigError, match="last is -1"):
        fp8.recipe(model, last=-1)
    fp8.recipe(model, first=2, last=2)
    with pytest.raises(HybridConfigError, match=r"FP8Linear, which has no FP8 form.* once"):
        fp8.recipe(model, first=2, last=2)


def trained(degrees: dict[str, int], regions: str, compute: str = "float64") -> dict[str, Any]:
    """Loss, scaled gradients of this rank and the whole loss after a step's backward."""
    world = torch.distributed.get_world_size()
    topology = Topology(Layout(world, **degrees))
    storage = "float64" if compute == "float64" else "float32"
    built = build(
        lambda: HybridForCausalLM(MODEL),
        topology,
        sharding.plan(MODEL),
        head=sharding.HEAD,
        tail=sharding.TAIL,
        precision=Precision(parameters=storage, compute=compute),
        regions=regions,
    )
    initialise([*built.pieces(), *built.buffers()], MODEL, 3)
    (part,) = built.parts
    fp8.recipe(part, topology, first=1, last=1)
    loss = LocalRunner(part, 1).train(IDS, (IDS * 3 + 1) % 37, 1 / IDS.numel())
    gradients = {
        piece.name: (piece.box, piece.parameter.grad.clone())
        for piece in built.pieces()
        if piece.parameter.grad is not None
    }
    return {"loss": float(loss), "gradients": gradients}


def test_recomputation_changes_no_bit() -> None:
    (plain,) = launch(trained, 1, {}, "none", timeout=60)
    for regions in ("full", "selective"):
        (found,) = launch(trained, 1, {}, regions, timeout=60)
        assert found["loss"] == plain["loss"]
        for name, (_, grad) in plain["gradients"].items():
            assert torch.equal(found["gradients"][name][1], grad), name


def test_mixed_precision_trains() -> None:
    (found,) = launch(trained, 1, {}, "none", "bfloat16", timeout=60)
    (exact,) = launch(trained, 1, {}, "none", timeout=60)
    assert found["loss"] == pytest.approx(exact["loss"], rel=0.02)


LAYOUTS: list[tuple[int, dict[str, int]]] = [(2, {"tp": 2, "ep": 2}), (2, {"tp": 2, "etp": 2})]


@pytest.mark.parametrize(("world", "degrees"), LAYOUTS, ids=str)
def test_ranks_train_what_one_does(world: int, degrees: dict[str, int]) -> None:
    (expected,) = launch(trained, 1, {}, "none", timeout=60)
    results = launch(trained, world, degrees, "none", timeout=120)
    compared = 0
    for found in results:
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-9)
        for name, (box, grad) in found["gradients"].items():
            if name.endswith(("norm.weight", "latent_in.weight", "latent_out.weight")):
                continue  # parts of a sum until the loop sums them
            whole = expected["gradients"][name][1]
            piece = whole[box.slices]
            if "router" in name or piece.shape != grad.shape:
                continue
            torch.testing.assert_close(grad, piece, rtol=1e-6, atol=1e-9, msg=name)
            compared += 1
    assert compared > 40


def test_sharded_experts_need_the_topology() -> None:
    def without() -> str:
        topology = Topology(Layout(2, tp=2, ep=2))
        built = build(
            lambda: HybridForCausalLM(MODEL),
            topology,
            sharding.plan(MODEL),
            head=sharding.HEAD,
            tail=sharding.TAIL,
            precision=Precision(parameters="float64", compute="float64"),
        )
        try:
            fp8.recipe(built.parts[0], first=1, last=1)
        except HybridConfigError as error:
            return str(error)
        return ""

    for text in launch(without, 2, timeout=60):
        assert "topology" in text and "tp" in text
