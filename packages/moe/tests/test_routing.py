"""Choices and weights, token by token, by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fivefold.moe.errors import MoEConfigError
from fivefold.moe.router_config import RouterConfig
from fivefold.moe.routing import choose, score, weigh

CONFIGS = [
    RouterConfig(),
    RouterConfig(normalize=False),
    RouterConfig(score="sigmoid"),
    RouterConfig(score="sigmoid", normalize=False, scale=2.5),
    RouterConfig(num_groups=4, groups_per_token=2),
    RouterConfig(score="sigmoid", num_groups=3, groups_per_token=1, scale=0.5),
    RouterConfig(score="sigmoid", num_groups=2, groups_per_token=2),
]


def by_hand(logits: list[float], bias: list[float], config: RouterConfig, k: int) -> Any:
    """Experts and weights of one token."""
    exps = [torch.tensor(x).double().exp().item() for x in logits]
    if config.score == "softmax":
        scores = [x / sum(exps) for x in exps]
    else:
        scores = [x / (1 + x) for x in exps]
    worth = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(worth) // config.num_groups
    groups = [sorted(worth[g * size : (g + 1) * size])[-2:] for g in range(config.num_groups)]
    best = sorted(range(config.num_groups), key=lambda g: (-sum(groups[g]), g))
    allowed = [e for e in range(len(worth)) if e // size in best[: config.groups_per_token]]
    experts = sorted(allowed, key=lambda e: (-worth[e], e))[:k]
    weights = [scores[e] for e in experts]
    if config.normalize:
        weights = [w / sum(weights) for w in weights]
    return experts, [w * config.scale for w in weights]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_token_by_hand(config: RouterConfig, biased: bool) -> None:
    logits = torch.randn(40, 12, dtype=torch.float64)
    bias = torch.randn(12, dtype=torch.float64) * 0.2 * biased
    scores = score(logits, config)
    experts = choose(scores, bias if biased else None, config, 3)
    weights = weigh(scores, experts, config)
    for token in range(40):
        chosen, wanted = by_hand(logits[token].tolist(), bias.tolist(), config, 3)
        assert experts[token].tolist() == chosen
        torch.testing.assert_close(weights[token], torch.tensor(wanted).double())


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_of_equal_experts_and_groups_the_first_ones_are_chosen(config: RouterConfig) -> None:
    experts = choose(torch.ones(3, 12), None, config, 3)
    assert experts.tolist() == [[0, 1, 2]] * 3


def test_normalised_softmax_is_the_softmax_over_the_chosen() -> None:
    logits = torch.randn(9, 7, dtype=torch.float64)
    config = RouterConfig()
    scores = score(logits, config)
    experts = choose(scores, None, config, 2)
    wanted = logits.gather(-1, experts).softmax(-1)
    torch.testing.assert_close(weigh(scores, experts, config), wanted)


def test_one_expert_by_sigmoid_has_its_score_as_weight() -> None:
    logits = torch.randn(9, 7, dtype=torch.float64, requires_grad=True)
    config = RouterConfig(score="sigmoid", normalize=False)
    scores = score(logits, config)
    weights = weigh(scores, choose(scores, None, config, 1), config)
    torch.testing.assert_close(weights.squeeze(-1), logits.max(-1).values.sigmoid())
    (grad,) = torch.autograd.grad(weights.sum(), logits)
    assert (grad.count_nonzero(-1) == 1).all()


def test_the_bias_has_no_part_in_weights_or_gradients() -> None:
    logits = torch.randn(9, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(8, dtype=torch.float64)
    config = RouterConfig(score="sigmoid", expert_bias=True)
    scores = score(logits, config)
    experts = choose(scores, bias, config, 2)
    assert not torch.equal(experts, choose(scores, None, config, 2))
    chosen: Tensor = logits.sigmoid().gather(-1, experts)
    torch.testing.assert_close(
        weigh(scores, experts, config), chosen / chosen.sum(-1, keepdim=True)
    )


def test_scores_that_are_all_zero_leave_numbers() -> None:
    config = RouterConfig(score="sigmoid")
    scores = score(torch.full((2, 4), -1e4), config)
    assert weigh(scores, choose(scores, None, config, 2), config).tolist() == [[0.0, 0.0]] * 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scale": 0.0}, r"router.scale is 0\.0; it must be above 0"),
        ({"num_groups": 0}, "router.num_groups is 0; it must be at least 1"),
        ({"groups_per_token": 2}, "router.groups_per_token is 2; it must be from 1 to num_groups"),
        ({"jitter": 1.0}, r"router.jitter is 1\.0; it must be at least 0 and below 1"),
        ({"bias_rate": -1.0}, r"router.bias_rate is -1\.0"),
        ({"aux_loss_coef": -0.1}, r"router.aux_loss_coef is -0\.1; it must be at least 0"),
        ({"global_loss_coef": -0.1}, r"router.global_loss_coef is -0\.1"),
        ({"z_loss_coef": -0.1}, r"router.z_loss_coef is -0\.1"),
    ],
)
def test_impossible_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(MoEConfigError, match=message):
        RouterConfig(**values)


@pytest.mark.parametrize(
    ("groups", "per_token", "num_experts", "k", "message"),
    [
        (5, 1, 12, 1, "num_experts 12 is not a multiple of router.num_groups 5"),
        (
            4,
            1,
            12,
            4,
            "num_experts_per_token is 4; the router.groups_per_token 1 of 4 groups",
        ),
        (4, 4, 4, 2, "router.num_groups is 4, one for each expert"),
    ],
)
def test_groups_that_do_not_fit(
    groups: int, per_token: int, num_experts: int, k: int, message: str
) -> None:
    with pytest.raises(MoEConfigError, match=message):
        RouterConfig(num_groups=groups, groups_per_token=per_token).check(num_experts, k)
