from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from fivefold.moe import Router
from fivefold.moe.router_config import RouterConfig
from fivefold.parallel_core.losses import SideOutputs

NO_LOSS = {"aux_loss_coef": 0.0}


def router(num_experts: int = 5, k: int = 2, **options: Any) -> tuple[Router, SideOutputs]:
    side = SideOutputs()
    module = Router(num_experts, 8, k, side, layer=3, config=RouterConfig(**NO_LOSS | options))
    module.double()
    nn.init.normal_(module.weight)
    return module, side


def hidden(batch: int = 3, length: int = 7) -> Tensor:
    return torch.randn(batch, length, 8, dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_weights_and_experts(k: int) -> None:
    module, _ = router(k=k)
    x = hidden()
    weights, experts = module(x)
    probs = (x.flatten(0, 1) @ module.weight.T).softmax(-1)
    assert weights.shape == experts.shape == (21, k) and experts.dtype == torch.int64
    for row, ids, found in zip(probs, experts, weights, strict=True):
        best = sorted(range(5), key=lambda e: -row[e].item())[:k]
        assert ids.tolist() == best
        torch.testing.assert_close(found, row[best] / row[best].sum(), rtol=1e-12, atol=0)


def test_of_equal_experts_the_lower_index_wins() -> None:
    module, _ = router(num_experts=64, k=4)
    with torch.no_grad():
        # Whole numbers, so that equal rows give equal scores to the last bit.
        module.weight.copy_(torch.tensor([1.0, -1, 2, 0, 1, 0, 0, 1]))
        module.weight[7] += torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0])
    x = torch.randint(-3, 4, (1, 200, 8)).double()
    _, experts = module(x)
    wins, loses = x[0, :, 0] > 0, x[0, :, 0] < 0
    assert experts[wins].tolist() == [[7, 0, 1, 2]] * int(wins.sum())
    assert experts[~wins].tolist() == [[0, 1, 2, 3]] * int((~wins).sum())
    assert wins.any() and loses.any() and (~wins & ~loses).any()


def test_narrow_inputs_are_scored_in_float32() -> None:
    module, _ = router()
    x = hidden().bfloat16()
    weights, experts = module.bfloat16()(x)
    logits = x.flatten(0, 1).float() @ module.weight.float().T
    top = logits.softmax(-1).topk(2)
    assert weights.dtype == torch.bfloat16 and torch.equal(experts, top.indices)
    assert torch.equal(weights, (top.values / top.values.sum(-1, keepdim=True)).bfloat16())


def brute_force(module: Router, x: Tensor, k: int, aux: float, z: float) -> tuple[Tensor, Tensor]:
    num_experts, length = module.weight.shape[0], x.shape[1]
    logits = x @ module.weight.T
    probs = logits.softmax(-1)
    chosen = probs.topk(k, dim=-1).indices
    balance = logits.new_zeros(())
    for b in range(x.shape[0]):
        for e in range(num_experts):
            share = float((chosen[b] == e).sum()) / (k * length)
            balance = balance + aux * num_experts * share * probs[b, :, e].sum() / length
    lengths = torch.log(logits.exp().sum(-1)).square().sum() / length
    return balance, z * lengths


@pytest.mark.parametrize(("k", "aux", "z"), [(2, 0.3, 0.2), (1, 0.3, 0), (5, 0, 0.2), (3, 1, 1)])
def test_losses_against_the_formulas(k: int, aux: float, z: float) -> None:
    module, side = router(k=k, aux_loss_coef=aux, z_loss_coef=z)
    side.weight = 0.25
    x = hidden()
    weights, _ = module(x)
    balance, lengths = brute_force(module, x, k, aux, z)
    assert ("aux_loss" in side.totals) == (aux > 0) and ("z_loss" in side.totals) == (z > 0)
    if aux:
        torch.testing.assert_close(side.totals["aux_loss"], balance.detach())
    if z:
        torch.testing.assert_close(side.totals["z_loss"], lengths.detach())
    # The losses reach the weights' gradient although the output itself asks for none.
    (weights * 0).sum().backward()
    wanted = torch.autograd.grad(0.25 * (balance + lengths), module.weight)[0]
    torch.testing.assert_close(module.weight.grad, wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("k", [1, 2])
def test_balance_loss_against_transformers(k: int) -> None:
    module, side = router(k=k, aux_loss_coef=0.5)
    x = hidden(1, 40)
    module(x)
    theirs = load_balancing_loss_func(((x[0] @ module.weight.detach().T).float(),), 5, k)
    # Theirs is k when balanced, ours is 1.
    assert float(side.totals["aux_loss"]) == pytest.approx(0.5 * float(theirs) / k, rel=1e-5)


def test_balance_loss_of_a_balanced_routing_is_its_coefficient() -> None:
    module, side = router(num_experts=8, k=2, aux_loss_coef=0.7)
    with torch.no_grad():
        module.weight.copy_(torch.eye(8) * 3)
    pairs = torch.eye(8).double() + torch.eye(8).double().roll(1, 0) * 0.5
    module(pairs.repeat(2, 1, 1))
    assert float(side.totals["aux_loss"]) == pytest.approx(2 * 0.7, rel=1e-12)


def test_parts_of_a_sequence_sum_to_the_whole() -> None:
    class Total(nn.Module):
        """What a sum over the ranks that share the sequences would give."""

        def __init__(self, whole: Tensor):
            super().__init__()
            self.whole = whole

        def forward(self, part: Tensor) -> Tensor:
            assert part.shape == self.whole.shape and not part.is_floating_point()
            return self.whole

    module, side = router(aux_loss_coef=0.3, z_loss_coef=0.2)
    x = hidden(2, 9)
    weights, experts = module(x)
    (weights.sum() * 0).backward()
    whole, grad = side.drain(), module.weight.grad.clone()  # type: ignore[union-attr]
    module.weight.grad = None
    counts = torch.stack([row.flatten().bincount(minlength=5) for row in experts.view(2, 9, 2)])
    module.sequence_total = Total(torch.cat((counts, torch.full((2, 1), 9)), 1))
    for part in (x[:, :4], x[:, 4:]):
        (module(part)[0].sum() * 0).backward()
    parts = side.drain()
    assert whole.keys() == parts.keys() == {"load.3", "aux_loss", "z_loss"}
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-12, atol=0)
    torch.testing.assert_close(module.weight.grad, grad, rtol=1e-11, atol=1e-14)


def test_the_bias_moves_towards_balance_and_only_chooses() -> None:
    module, side = router(k=2, expert_bias=True, bias_rate=0.02, score="sigmoid")
    x = hidden()
    before, _ = module(x)
    load = side.drain()["load.3"]
    module.after_step(load)
    lack = load.double().mean() - load
    assert module.bias is not None and module.bias.dtype == torch.float32
    assert torch.equal(module.bias, 0.02 * lack.sign().float()) and module.bias.any()
    for _ in range(40):
        module(x)
        module.after_step(side.drain()["load.3"])
    module(x)
    even = side.drain()["load.3"]
    assert even.max() - even.min() < load.max() - load.min()
    weights, experts = module(x)
    scores = (x.flatten(0, 1) @ module.weight.T).sigmoid().gather(1, experts)
    torch.testing.assert_close(weights, scores / scores.sum(1, keepdim=True))
    assert not torch.equal(before, weights)


def test_global_loss_uses_the_load_of_the_step_before() -> None:
    module, side = router(k=2, global_loss_coef=0.3)
    x, y = hidden(), hidden(2, 5)
    module(x)
    first = side.drain()
    assert float(first["global_loss"]) == 0
    module.after_step(first["load.3"])
    weights, _ = module(y)
    shares = first["load.3"].double() / (21 * 2)
    wanted = 0.3 * 5 * (shares * (y @ module.weight.T).softmax(-1).sum(1) / 5).sum()
    torch.testing.assert_close(side.totals["global_loss"], wanted.detach(), rtol=1e-6, atol=0)
    (weights * 0).sum().backward()
    grad = torch.autograd.grad(wanted, module.weight)[0]
    torch.testing.assert_close(module.weight.grad, grad, rtol=1e-6, atol=1e-9)


def test_shares_of_sigmoids_sum_to_one_in_the_balance_loss() -> None:
    module, side = router(num_experts=8, k=2, aux_loss_coef=0.7, score="sigmoid")
    with torch.no_grad():
        module.weight.copy_(torch.eye(8) * 3)
    pairs = torch.eye(8).double() + torch.eye(8).double().roll(1, 0) * 0.5
    module(pairs.repeat(2, 1, 1))
    assert float(side.totals["aux_loss"]) == pytest.approx(2 * 0.7, rel=1e-12)


def test_jitter_is_noise_of_training() -> None:
    module, _ = router(jitter=0.5)
    x = hidden()
    noisy, plain = module(x)[0], module.eval()(x)[0]
    assert not torch.equal(noisy, plain) and torch.equal(module(x)[0], plain)


def test_scores_in_float64_on_request() -> None:
    module, _ = router(dtype="float64")
    x = hidden().float()
    _, experts = module.float()(x)
    probs = (x.flatten(0, 1).double() @ module.weight.double().T).softmax(-1)
    assert torch.equal(experts, probs.topk(2).indices)
    weights = module(x)[0]
    assert weights.dtype == torch.float32


def test_load_counts_tokens_per_expert() -> None:
    module, side = router()
    _, experts = module(hidden())
    module(hidden(1, 1))
    load = side.totals["load.3"]
    assert load.shape == (5,) and int(load.sum()) == (21 + 1) * 2
    assert (load >= experts.flatten().bincount(minlength=5)).all()
    assert set(side.totals) == {"load.3"}


def test_evaluation_leaves_nothing_behind() -> None:
    module, side = router(aux_loss_coef=1, z_loss_coef=1)
    module.eval()(hidden())
    assert side.totals == {}


def test_starts_from_drawn_weights() -> None:
    torch.manual_seed(5)
    module = Router(60, 100, 2, SideOutputs(), initializer_range=0.3)
    first = module.weight.detach().clone()
    assert 0.28 < first.std() < 0.32 and abs(first.mean()) < 0.02
    assert 0.018 < Router(60, 100, 2, SideOutputs()).weight.std() < 0.022
    torch.manual_seed(5)
    module.reset_parameters()
    assert torch.equal(module.weight, first) and module.weight.requires_grad
