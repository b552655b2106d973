"""Routing by hand, and what routers leave beside their output."""

import sys
from dataclasses import replace

import pytest
import torch

from fivefold.hybrid_ssm import HybridConfig, HybridForCausalLM
from fivefold.hybrid_ssm.blocks.experts import ExpertsMixer, Relu2Experts, make_router
from fivefold.hybrid_ssm.errors import HybridConfigError
from fivefold.moe.router import Router
from fivefold.parallel_core.losses import SideOutputs

SIZES = {
    "vocab_size": 9,
    "hidden_size": 4,
    "pattern": "E",
    "num_experts": 4,
    "num_experts_per_token": 2,
    "expert_intermediate_size": 6,
    "shared_intermediate_size": 5,
}


def router_of(scores: list[float], bias: list[float], **changes: object) -> Router:
    """A router that gives the input (1, 0, ...) these sigmoid scores."""
    config = HybridConfig(**(SIZES | changes))  # type: ignore[arg-type]
    router = make_router(config, 0, SideOutputs()).eval()
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, 0] = torch.logit(torch.tensor(scores))
        router.bias.copy_(torch.tensor(bias))
    return router


def route(router: Router) -> tuple[list[int], list[float]]:
    x = torch.zeros(1, 1, 4)
    x[..., 0] = 1
    weights, experts = router(x)
    order = experts[0].argsort()
    return experts[0][order].tolist(), weights[0][order].tolist()


def test_the_bias_chooses_and_does_not_weigh() -> None:
    scores, bias = [0.9, 0.5, 0.25, 0.1], [0.0, 0.0, 1.0, 0.0]
    experts, weights = route(router_of(scores, bias, routed_scaling_factor=2.0))
    assert experts == [0, 2]
    assert weights == pytest.approx([2 * 0.9 / 1.15, 2 * 0.25 / 1.15])
    _, plain = route(router_of(scores, bias, normalise_weights=False))
    assert plain == pytest.approx([0.9, 0.25])


def test_groups_count_by_their_two_best() -> None:
    """The best single expert is in the group whose two best are worth less."""
    scores = [0.95, 0.1, 0.6, 0.55]
    experts, _ = route(router_of(scores, [0.0] * 4, num_expert_groups=2))
    assert experts == [2, 3]
    assert route(router_of(scores, [0.0] * 4))[0] == [0, 2]


def test_a_large_bias_keeps_its_small_differences_in_bfloat16() -> None:
    bias = [64.0, 64.25, 64.0, 64.125]
    router = router_of([0.5, 0.5, 0.5, 0.5], bias).to(torch.bfloat16)
    assert router.bias.dtype == torch.float32
    weights, experts = router(torch.ones(1, 1, 4, dtype=torch.bfloat16))
    assert sorted(experts[0].tolist()) == [1, 3]
    assert weights.dtype == torch.bfloat16


def test_balanced_scores_have_the_loss_of_their_coefficient() -> None:
    side = SideOutputs()
    config = HybridConfig(**SIZES, aux_loss_coef=0.5, z_loss_coef=0.25)  # type: ignore[arg-type]
    router = make_router(config, 3, side).train()
    with torch.no_grad():
        router.weight.copy_(torch.eye(4) * 4)
    x = torch.eye(4)[None] + torch.eye(4).roll(1, 0)[None]  # each expert is chosen twice
    router(x)
    totals = side.drain()
    assert totals["load.3"].tolist() == [2, 2, 2, 2]
    assert float(totals["aux_loss"].detach()) == pytest.approx(0.5, rel=1e-5)
    logits = x @ router.weight.T
    expected = 0.25 * logits.logsumexp(-1).square().mean()
    assert float(totals["z_loss"].detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_a_step_moves_the_biases_towards_balance() -> None:
    config = HybridConfig(**SIZES | {"pattern": "E-E"}, intermediate_size=8, bias_rate=0.25)  # type: ignore[arg-type]
    model = HybridForCausalLM(config)
    loads = {"load.0": torch.tensor([8, 0, 4, 4]), "load.2": torch.tensor([0, 0, 16, 0])}
    model.after_step(loads | {"aux_loss": torch.tensor(1.0)})
    found = [model.get_buffer(f"layers.{index}.mixer.router.bias").tolist() for index in (0, 2)]
    assert found == [[-0.25, 0.25, 0, 0], [0.25, 0.25, -0.25, 0.25]]
    still = HybridForCausalLM(replace(config, bias_rate=0.0))
    still.after_step(loads)
    assert not still.get_buffer("layers.0.mixer.router.bias").any()
    model.after_step({"load.2": loads["load.2"]})
    assert model.get_buffer("layers.0.mixer.router.bias").tolist() == found[0]
    assert model.get_buffer("layers.2.mixer.router.bias").tolist() == [0.5, 0.5, -0.5, 0.5]


def test_experts_by_hand() -> None:
    torch.manual_seed(0)
    experts = Relu2Experts(3, 4, 6)
    torch.nn.init.normal_(experts.up)
    torch.nn.init.normal_(experts.down)
    rows, counts = torch.randn(5, 4), torch.tensor([2, 0, 3])
    found = experts(rows, counts)
    for row, (x, expert) in enumerate(zip(rows, [0, 0, 2, 2, 2], strict=True)):
        expected = experts.down[expert] @ (experts.up[expert] @ x).relu().square()
        torch.testing.assert_close(found[row], expected)


def test_the_shared_expert_sees_the_full_width() -> None:
    config = HybridConfig(**SIZES, latent_size=2)  # type: ignore[arg-type]
    mixer = ExpertsMixer(config, 0, SideOutputs())
    assert mixer.shared.up_proj.in_features == 4
    assert (mixer.latent_in.out_features, mixer.experts.up.shape[2]) == (2, 2)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("fivefold.moe")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "fivefold.hybrid_ssm.blocks.experts")

    class Hidden:
        def find_spec(self, name: str, *_: object) -> None:
            if name.startswith("fivefold.moe"):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Hidden(), *sys.meta_path])
    with pytest.raises(HybridConfigError, match=r"layer 0 of pattern 'E' has experts.*\[moe\]"):
        HybridForCausalLM(HybridConfig(**SIZES))  # type: ignore[arg-type]
