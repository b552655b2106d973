"""FP8: which modules, an explicit emulation, ranks beside one process, and training with it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fivefold.kernels import Linear, fp8_quantize
from fivefold.moe import Experts, MoEConfig, MoEForCausalLM, fp8, sharding
from fivefold.moe.errors import MoEConfigError
from fivefold.moe.fp8 import FP8Experts
from fivefold.moe.router_config import RouterConfig
from fivefold.moe.train import check, load_run, make_trainer
from fivefold.parallel_core.build import build
from fivefold.parallel_core.data_parallel import Precision
from fivefold.parallel_core.fp8 import grouped, linears, scaling
from fivefold.parallel_core.fp8.linears import FP8Linear
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.pipeline import LocalRunner
from fivefold.parallel_core.topology import Topology

from .runs import ONE_RANK

MODEL = MoEConfig(
    vocab_size=37,
    hidden_size=16,
    num_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    model_type="qwen2_moe",
    qkv_bias=True,
    expert_intermediate_size=8,
    num_experts=4,
    num_experts_per_token=2,
    shared_intermediate_size=8,
    shared_gate=True,
    dense_layers=(1,),
    intermediate_size=24,
    router=RouterConfig(aux_loss_coef=0.0),
    initializer_range=0.3,
)
IDS = torch.arange(4 * 8).view(4, 8) * 5 % 37
TARGETS = (IDS * 3 + 1) % 37


def test_chosen_modules() -> None:
    model = MoEForCausalLM(MODEL)
    assert fp8.recipe(model, first=1) == (
        "layers.1.attention.qkv",
        "layers.1.attention.o_proj",
        "layers.1.mlp.gate_up",
        "layers.1.mlp.down",
        "layers.2.attention.qkv",
        "layers.2.attention.o_proj",
        "layers.2.mlp.shared.gate_up",
        "layers.2.mlp.shared.down",
        "layers.2.mlp.experts",
    )
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert kinds["layers.1.attention.qkv.k_proj"] is kinds["layers.2.mlp.shared.down"] is FP8Linear
    assert kinds["layers.2.mlp.experts"] is FP8Experts
    assert kinds["layers.0.mlp.experts"] is Experts
    assert kinds["lm_head"] is kinds["layers.2.mlp.shared_gate"] is Linear


def test_experts_can_stay() -> None:
    names = fp8.recipe(MoEForCausalLM(MODEL), last=2, experts=False)
    assert [name for name in names if "mlp" in name] == [
        "layers.0.mlp.shared.gate_up",
        "layers.0.mlp.shared.down",
    ]


def test_what_cannot_be() -> None:
    model = MoEForCausalLM(MODEL)
    with pytest.raises(MoEConfigError, match="first=3 and last=0 leave none of the 3 layers"):
        fp8.recipe(model, first=3)
    fp8.recipe(model)
    with pytest.raises(MoEConfigError, match=r"FP8Linear, which has no FP8 form.* Experts, once"):
        fp8.recipe(model)


def test_parameters_stay_and_values_are_near() -> None:
    model = MoEForCausalLM(MODEL).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reference = model(IDS).detach()
    fp8.recipe(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    found = model(IDS).detach()
    assert 0 < float((found - reference).norm() / reference.norm()) < 0.2


class _Float8(torch.autograd.Function):
    """Rounds to E4M3 and back, and lets gradients through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        values, scale = fp8_quantize(x, scaling.E4M3)
        return values.to(x.dtype) / scale.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class _Float8Gradient(torch.autograd.Function):
    """Rounds the gradient to E5M2 and back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        values, scale = fp8_quantize(grads[0], scaling.E5M2)
        return values.to(grads[0].dtype) / scale.to(grads[0].dtype)


def emulated(experts: Experts, x_th: Tensor, counts: list[int]) -> Tensor:
    """The experts with every operand of every product rounded by hand."""

    def products(rows: Tensor, weight: Tensor) -> Tensor:
        rows, weight = _Float8.apply(rows), _Float8.apply(weight)
        parts = [part @ w.T for part, w in zip(rows.split(counts), weight, strict=True)]
        out: Tensor = _Float8Gradient.apply(torch.cat(parts))
        return out

    packed = products(x_th, experts.gate_up.flatten(1, 2))
    gate, up = packed.chunk(2, -1)
    return products(F.silu(gate) * up, experts.down)


def test_experts_are_an_explicit_emulation() -> None:
    counts = [3, 0, 5, 2]
    experts = Experts(4, 16, 8, 0.3).double()
    x = torch.randn(10, 16, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(10, 16, dtype=torch.float64)
    expected = emulated(experts, x, counts)
    right = torch.autograd.grad(expected, (x, experts.gate_up, experts.down), dy)
    model = MoEForCausalLM(MODEL).double()
    layer: Any = model.layers["0"]
    layer.mlp.experts = experts
    fp8.recipe(model)
    assert type(experts) is FP8Experts
    found = experts(x, torch.tensor(counts))
    gradients = torch.autograd.grad(found, (x, experts.gate_up, experts.down), dy)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for mine, other in zip(gradients, right, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


# ---- ranks ---------------------------------------------------------------------------------


def trained(degrees: dict[str, int], regions: str = "none") -> dict[str, Any]:
    """Loss, gradients of this rank and the scales of experts after a backward."""
    world = torch.distributed.get_world_size()
    topology = Topology(Layout(world, **degrees))
    model = build(
        lambda: MoEForCausalLM(MODEL),
        topology,
        sharding.plan(MODEL),
        head=sharding.HEAD,
        tail=sharding.TAIL,
        precision=Precision(parameters="float64", compute="float64"),
        regions=regions,
    )
    (part,) = model.parts
    model.initialise(cast(MoEForCausalLM, part).initialisation, 3)
    fp8.recipe(cast(MoEForCausalLM, part), topology)
    scales: dict[str, list[float]] = {"experts": [], "linears": []}

    def recorded(key: str) -> Callable[..., Tensor]:
        def scale_of(*args: Any) -> Tensor:
            scale = scaling.scale_of(*args)
            scales[key].append(float(scale))
            return scale

        return scale_of

    grouped.scale_of = recorded("experts")  # type: ignore[attr-defined]
    linears.scale_of = recorded("linears")  # type: ignore[attr-defined]
    loss = LocalRunner(part, 1).train(IDS, TARGETS, 1 / IDS.numel())
    gradients = {
        piece.name: (piece.box, piece.parameter.grad.clone())
        for piece in model.pieces()
        if piece.parameter.grad is not None
    }
    return {"loss": float(loss), "gradients": gradients, "scales": scales}


LAYOUTS = [{"tp": 2, "ep": 2}, {"tp": 2, "etp": 2}]


@pytest.mark.parametrize("degrees", LAYOUTS, ids=str)
def test_ranks_round_with_the_scales_of_one(degrees: dict[str, int]) -> None:
    (expected,) = launch(trained, 1, {}, timeout=60)
    results = launch(trained, 2, degrees, timeout=60)
    compared = 0
    for found in results:
        # Two layers with experts, two products, three rounded tensors each. Sums in another order
        # may move a largest magnitude by a bit of float64, far below the scale's float32.
        assert len(found["scales"]["experts"]) == 12
        assert found["scales"]["experts"] == expected["scales"]["experts"]
        assert found["scales"]["linears"]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-9)
        for name, (box, grad) in found["gradients"].items():
            whole = expected["gradients"][name][1]
            if ".experts." in name:
                torch.testing.assert_close(grad, whole[box.slices], rtol=1e-6, atol=1e-9, msg=name)
                compared += 1
    assert compared == 8


def test_recomputation_changes_no_bit() -> None:
    (plain,) = launch(trained, 1, {}, timeout=60)
    (found,) = launch(trained, 1, {}, "full", timeout=60)
    assert found["loss"] == plain["loss"]
    for name, (_, grad) in plain["gradients"].items():
        assert torch.equal(found["gradients"][name][1], grad), name


# ---- training ------------------------------------------------------------------------------


def learned(use_fp8: bool) -> list[float]:
    """Losses of a bfloat16 run on one batch, with or without FP8."""
    torch.manual_seed(0)
    model = MoEForCausalLM(MODEL).train()
    if use_fp8:
        fp8.recipe(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(model(IDS), TARGETS) / IDS.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_learns_as_bfloat16_does() -> None:
    plain, in_fp8 = learned(False), learned(True)
    assert plain != in_fp8 and plain[0] == pytest.approx(in_fp8[0], rel=0.05)
    assert plain[-1] < 0.2 * plain[0] and in_fp8[-1] < 0.2 * in_fp8[0]
    assert sum(in_fp8) == pytest.approx(sum(plain), rel=0.1)


def test_a_run_with_the_section_trains_in_fp8(run_file: Path) -> None:
    assert load_run(run_file, ONE_RANK).fp8 is None
    config = load_run(run_file, {**ONE_RANK, "fp8.first": "1"})
    assert config.fp8 == fp8.FP8Config(first=1)
    config.data.prepare(config.data.load_tokenizer())
    (part,) = make_trainer(config, Topology.local(), None).model.parts
    kinds = [type(part.get_submodule(f"layers.{i}.mlp.experts")) for i in range(2)]
    assert [issubclass(kind, FP8Experts) for kind in kinds] == [False, True]
    with pytest.raises(MoEConfigError, match="leave none of the 2 layers"):
        check(load_run(run_file, {**ONE_RANK, "fp8.first": "2"}), 1)
