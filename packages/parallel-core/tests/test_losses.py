import pytest
import torch
import torch.nn.functional as F

from fivefold.parallel_core.losses import CrossEntropy, SideOutputs


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_the_sum_over_the_valid_tokens(smoothing: float) -> None:
    logits = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 7, (2, 5))
    targets[1, :3] = 4  # the ignored one below, which is a legal id too
    loss = CrossEntropy(ignore_index=4, label_smoothing=smoothing)(logits, targets)
    total = torch.zeros((), dtype=torch.float64)
    for row, target in zip(logits.flatten(0, 1), targets.flatten(), strict=True):
        if target != 4:
            log_p = row.log_softmax(0)
            total = total - (1 - smoothing) * log_p[target] - smoothing * log_p.mean()
    torch.testing.assert_close(loss, total, rtol=1e-14, atol=0)


def test_cross_entropy_of_ignored_tokens_only_is_zero() -> None:
    logits = torch.randn(3, 7, requires_grad=True)
    loss = CrossEntropy()(logits, torch.full((3,), -100))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_cross_entropy_of_bfloat16_is_taken_in_float32() -> None:
    logits = torch.randn(3, 7).bfloat16()
    targets = torch.tensor([1, 2, 3])
    loss = CrossEntropy()(logits, targets)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, F.cross_entropy(logits.float(), targets, reduction="sum"))


def test_a_side_loss_has_the_gradient_of_a_term_of_the_loss() -> None:
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    side = SideOutputs()
    side.weight = 0.25
    y = side.loss("square", x.square().sum(), x * 3)
    (found,) = torch.autograd.grad(y.sin().sum(), x)
    (wanted,) = torch.autograd.grad((x * 3).sin().sum() + 0.25 * x.square().sum(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-15, atol=0)
    assert torch.equal(y, x * 3)


def test_the_weight_may_be_set_after_the_forward_pass() -> None:
    x = torch.ones(1, requires_grad=True)
    side = SideOutputs()
    y = side.loss("square", x.square().sum(), x)
    side.weight = 10.0
    assert torch.autograd.grad(y.sum(), x)[0].item() == 1 + 10 * 2


def test_side_outputs_add_up_until_they_are_drained() -> None:
    side = SideOutputs()
    counted = torch.tensor([1.0, 2.0])
    side.count("tokens", counted)
    side.count("tokens", counted)
    counted.zero_()  # the total does not follow what it was made of
    with torch.no_grad():
        x = torch.ones(2)
        assert side.loss("aux", torch.tensor(3.0), x) is x
    totals = side.drain()
    assert {name: value.tolist() for name, value in totals.items()} == {
        "tokens": [2.0, 4.0],
        "aux": 3.0,
    }
    assert side.drain() == {}


def test_totals_hold_no_graph() -> None:
    side = SideOutputs()
    x = torch.ones(2, requires_grad=True)
    side.loss("aux", x.sum(), x)
    assert not side.totals["aux"].requires_grad
