from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fivefold.moe import MoEConfig
from fivefold.moe.attention import Attention, AttentionCore
from fivefold.moe.rotary import Positions, Rotary


def attend(q: Tensor, k: Tensor, v: Tensor, start: int, window: int | None) -> Tensor:
    """One query, one head at a time."""
    out = torch.zeros_like(q)
    shared = q.shape[2] // k.shape[2]
    for i in range(q.shape[1]):
        last = start + i
        first = 0 if window is None else max(0, last - window + 1)
        for head in range(q.shape[2]):
            keys, values = (x[:, first : last + 1, head // shared] for x in (k, v))
            scores = torch.einsum("bd,btd->bt", q[:, i, head], keys) / q.shape[-1] ** 0.5
            out[:, i, head] = torch.einsum("bt,btd->bd", scores.softmax(-1), values)
    return out


@pytest.mark.parametrize("window", [None, 1, 3, 9, 100])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize(
    ("num_queries", "num_keys", "start"),
    [(9, 9, None), (1, 9, None), (4, 9, None), (9, 9, 0), (4, 9, 0), (3, 9, 4), (1, 9, 0)],
)
def test_core_against_one_query_at_a_time(
    num_queries: int, num_keys: int, start: int | None, heads: tuple[int, int], window: int | None
) -> None:
    q = torch.randn(2, num_queries, heads[0], 6, dtype=torch.float64, requires_grad=True)
    k, v = torch.randn(2, 2, num_keys, heads[1], 6, dtype=torch.float64).unbind()
    k, v = k.requires_grad_(), v.requires_grad_()
    out = AttentionCore(window)(q, k, v, start)
    wanted = attend(q, k, v, num_keys - num_queries if start is None else start, window)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), weight)
    right = torch.autograd.grad(wanted, (q, k, v), weight)
    torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-12)


def test_a_slice_of_the_heads_works_unchanged(tiny: Callable[..., MoEConfig]) -> None:
    attention = Attention(tiny()).double()
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    whole = attention(x, Rotary(Positions(), 0, 8, 1e4))
    parts = []
    for half in range(2):
        part = Attention(tiny()).double()
        for name, rows in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8)):
            weight = attention.qkv.get_parameter(f"{name}.weight").detach()
            linear = part.qkv.get_submodule(name)
            linear.weight = torch.nn.Parameter(weight[half * rows : (half + 1) * rows])
        columns = attention.o_proj.weight.detach()[:, half * 16 : (half + 1) * 16]
        part.o_proj.weight = torch.nn.Parameter(columns)
        parts.append(part(x, Rotary(Positions(), 0, 8, 1e4)))
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-12, atol=1e-12)
