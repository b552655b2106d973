"""Forward KL: closed forms, direction, gradients, and a vocabulary over ranks."""

import torch
from torch import Tensor

from fivefold.hybrid_ssm.compress.divergence import forward_kl
from fivefold.parallel_core.collectives import piece_along
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.topology import Topology


def logits(size: int = 7, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, size, generator=generator, dtype=torch.float64) * 3


def test_of_itself_it_is_0() -> None:
    found = forward_kl(logits(), logits())
    assert found.shape == (5,) and torch.equal(found, torch.zeros(5, dtype=torch.float64))


def test_closed_form_and_direction() -> None:
    teacher = torch.tensor([[0.9, 0.1]]).log()
    student = torch.tensor([[0.5, 0.5]]).log()
    expected = 0.9 * torch.tensor(0.9 / 0.5).log() + 0.1 * torch.tensor(0.1 / 0.5).log()
    torch.testing.assert_close(forward_kl(student, teacher)[0], expected)
    back = 0.5 * torch.tensor(0.5 / 0.9).log() + 0.5 * torch.tensor(0.5 / 0.1).log()
    torch.testing.assert_close(forward_kl(teacher, student)[0], back)
    assert back > expected


def test_gradient_and_temperature() -> None:
    for temperature in (1.0, 2.5):
        student, teacher = logits().requires_grad_(), logits(seed=1)
        weight = torch.arange(1.0, 6.0, dtype=torch.float64)
        found = forward_kl(student, teacher, temperature)
        (grad,) = torch.autograd.grad((found * weight).sum(), student)
        log_q, log_p = ((x / temperature).log_softmax(-1) for x in (student, teacher))
        expected = temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        (theirs,) = torch.autograd.grad((expected * weight).sum(), student)
        torch.testing.assert_close(grad, theirs, rtol=1e-12, atol=1e-12)


def test_narrow_logits_sum_in_float32() -> None:
    student, teacher = logits().bfloat16().requires_grad_(), logits(seed=1).bfloat16()
    found = forward_kl(student, teacher)
    assert found.dtype == torch.float32
    found.sum().backward()
    assert student.grad is not None and student.grad.dtype == torch.bfloat16
    expected = forward_kl(student.detach().float(), teacher.float())
    torch.testing.assert_close(found, expected)


def of_rank() -> tuple[Tensor, Tensor]:
    """A vocabulary of 7 over two ranks, the eighth column being padding."""
    axis = Topology(Layout(2, tp=2)).axis("tp")
    whole = [torch.nn.functional.pad(x, (0, 1), value=9.0) for x in (logits(), logits(seed=1))]
    student, teacher = (piece_along(x, axis, 1).clone() for x in whole)
    student.requires_grad_()
    found = forward_kl(student, teacher, 2.0, axis, 7)
    found.sum().backward()
    assert student.grad is not None
    return found.detach(), student.grad


def test_over_ranks_it_is_the_same() -> None:
    student = logits().requires_grad_()
    expected = forward_kl(student, logits(seed=1), 2.0)
    expected.sum().backward()
    (first, left), (second, right) = launch(of_rank, 2, timeout=60)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected.detach(), rtol=1e-12, atol=1e-12)
    grad = torch.cat([left, right], 1)
    torch.testing.assert_close(grad[:, :7], student.grad, rtol=1e-12, atol=1e-12)
    assert torch.equal(grad[:, 7], torch.zeros(5, dtype=torch.float64))
