"""Parameters of which each rank has a part."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from fivefold.kernels import FusedAdamW

from .parts import (
    assert_equal,
)


@pytest.fixture
def one_rank() -> Iterator[Any]:
    from torch.distributed.device_mesh import init_device_mesh

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


def test_fully_sharded_parameters(one_rank: Any) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = nn.Linear(5, 3)
    theirs = copy.deepcopy(model)
    fully_shard(model, mesh=one_rank)
    optimizer = FusedAdamW(model.parameters(), max_norm=0.1, ema_decay=0.9)
    other = torch.optim.AdamW(theirs.parameters())
    inputs = torch.randn(4, 5)
    for _ in range(3):
        for each in (model, theirs):
            each.zero_grad()
            each(inputs).square().sum().backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
        optimizer.step()
        other.step()
        torch.testing.assert_close(optimizer.grad_norm, norm)
    whole = [p.full_tensor().detach() for p in model.parameters()]
    assert_equal(whole, [p.detach() for p in theirs.parameters()], within=1e-6)
    assert all(isinstance(state["ema"], DTensor) for state in optimizer.state.values())
    with optimizer.averaged():
        pass
