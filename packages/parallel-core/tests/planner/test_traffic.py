"""The planner's messages are those that ``CommLedger`` counts on real ranks."""

from itertools import product

import pytest
import torch

from fivefold.parallel_core import CommLedger, Layout, Topology, launch, parallelize, recompute
from fivefold.parallel_core.planner.local import Local
from fivefold.parallel_core.planner.models import Experts, ModelShape
from fivefold.parallel_core.planner.setup import Recompute
from fivefold.parallel_core.planner.traffic import layer_traffic

from ..gpt import GPT, A, B, H, S, plan

MODES: tuple[Recompute, ...] = ("none", "selective", "full")
SIZES = (2, 4, 8)
Found = dict[tuple[bool, Recompute, int], dict[tuple[str, str], tuple[int, float]]]


def local(t: int, sequence: bool, mode: Recompute, size: int) -> Local:
    return Local(
        microbatch=B,
        length=S,
        tp=t,
        cp=1,
        ep=1,
        etp=1,
        sequence=sequence,
        element_size=size,
        recompute=mode,
        imbalance=1.0,
    )


def measured(t: int, num_layers: int) -> Found:
    topology = Topology(Layout(t, tp=t))
    found: Found = {}
    dtypes = (torch.bfloat16, torch.float32, torch.float64)
    for sequence, mode, dtype in product((False, True), MODES, dtypes):
        model = GPT(num_layers).to(dtype)
        parallelize(model, topology, plan(sequence))
        recompute(model, mode)
        length = S // t if sequence else S
        x = torch.randn(B, length, H, dtype=dtype, requires_grad=True)
        with CommLedger(topology) as ledger:
            model(x).sum().backward()
        entries = {key: (entry.calls, entry.bytes) for key, entry in ledger.entries.items()}
        found[sequence, mode, dtype.itemsize] = entries
    return found


@pytest.mark.parametrize(("t", "num_layers"), [(2, 1), (2, 3), (4, 1)])
def test_calls_and_bytes_of_tensor_parallel_layers(t: int, num_layers: int) -> None:
    gpt = ModelShape(name="gpt", hidden=H, num_layers=1, num_heads=A, vocabulary=8, dropout=True)
    for found in launch(measured, t, t, num_layers):
        assert len(found) == 18
        for (sequence, mode, size), entries in found.items():
            expected = layer_traffic(gpt, local(t, sequence, mode, size), "T")
            times = {k: (num_layers * n, num_layers * b) for k, (n, b) in expected.items()}
            assert entries == times, (sequence, mode, size)


def test_experts_send_what_parallel_folding_says() -> None:
    """Notes of arXiv 2504.14960: Mixtral's EP8/ETP1 sends half of what EP4/ETP2 does."""
    model = ModelShape(
        name="moe",
        hidden=16,
        num_layers=1,
        num_heads=4,
        vocabulary=8,
        experts=Experts(num_experts=8, top_k=2, ffn=32),
    )

    def sent(ep: int, etp: int) -> float:
        base = local(2, True, "none", 2)
        names = Local.__dataclass_fields__
        sizes = {name: getattr(base, name) for name in names} | {"ep": ep, "etp": etp}
        traffic = layer_traffic(model, Local(**sizes), "E")
        return sum(s.bytes for (_, axis), s in traffic.items() if axis in ("ep", "etp"))

    unit = 4 * B * S // 2 * 2 * 16 * 2
    assert sent(8, 1) == 0.875 * unit
    assert sent(4, 2) == (0.75 + 1.0) * unit
