import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fivefold.moe import Experts


def experts(num: int = 3, hidden: int = 6, width: int = 4) -> Experts:
    module = Experts(num, hidden, width).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def one_by_one(module: Experts, x: Tensor, counts: list[int]) -> Tensor:
    rows = []
    for e, part in enumerate(x.split(counts)):
        gate, up = (F.linear(part, module.gate_up[e, i]) for i in range(2))
        rows.append(F.linear(gate * gate.sigmoid() * up, module.down[e]))
    return torch.cat(rows)


@pytest.mark.parametrize("counts", [[2, 0, 5], [0, 0, 0], [0, 7, 0]])
def test_against_one_expert_at_a_time(counts: list[int]) -> None:
    module = experts()
    x = torch.randn(sum(counts), 6, dtype=torch.float64, requires_grad=True)
    out, wanted = module(x, torch.tensor(counts)), one_by_one(module, x, counts)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    inputs = (x, *module.parameters())
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, inputs, grad)
    torch.testing.assert_close(
        found, torch.autograd.grad(wanted, inputs, grad), rtol=1e-11, atol=1e-12
    )


def test_slices_of_the_width_sum_to_the_whole() -> None:
    module, counts = experts(), torch.tensor([2, 1, 4])
    x = torch.randn(7, 6, dtype=torch.float64)
    total = torch.zeros_like(x)
    for half in (slice(0, 2), slice(2, 4)):
        part = experts()
        part.gate_up = nn.Parameter(module.gate_up.detach()[:, :, half].contiguous())
        part.down = nn.Parameter(module.down.detach()[:, :, half].contiguous())
        total += part(x, counts).detach()
    torch.testing.assert_close(total, module(x, counts).detach(), rtol=1e-12, atol=1e-12)


def test_some_of_the_experts() -> None:
    module = experts()
    part = experts(2)
    part.gate_up = nn.Parameter(module.gate_up.detach()[1:])
    part.down = nn.Parameter(module.down.detach()[1:])
    x = torch.randn(5, 6, dtype=torch.float64)
    found = part(x, torch.tensor([2, 3]))
    assert torch.equal(found, module(x, torch.tensor([0, 2, 3])))


def test_starts_from_drawn_weights() -> None:
    torch.manual_seed(5)
    module = Experts(4, 40, 30, initializer_range=0.3)
    first = [parameter.detach().clone() for parameter in module.parameters()]
    assert all(0.28 < value.std() < 0.32 and abs(value.mean()) < 0.02 for value in first)
    assert all(0.018 < value.std() < 0.022 for value in Experts(4, 40, 30).parameters())
    torch.manual_seed(5)
    module.reset_parameters()
    assert all(map(torch.equal, module.parameters(), first))


def test_nothing_is_drawn_on_meta() -> None:
    state = torch.get_rng_state()
    with torch.device("meta"):
        module = Experts(1 << 10, 1 << 14, 1 << 14)
    assert all(parameter.is_meta for parameter in module.parameters())
    assert torch.equal(torch.get_rng_state(), state)
