"""What blocks send, by the ledger, is what the formula says: forward and backward, even and not."""

import pytest
import torch
import torch.distributed as dist
from axial_job import network
from torch import Tensor, nn

from fivefold.fold.axial.traffic import Traffic, block_traffic, pair_traffic
from fivefold.fold.model.blocks import EvoformerBlock, Masks, TemplatePairBlock
from fivefold.fold.sharding import AxialBlock
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.ledger import CommLedger
from fivefold.parallel_core.parameters import ParameterTable
from fivefold.parallel_core.shares import share_sizes
from fivefold.parallel_core.topology import Topology

CONFIG, C_M, C_Z, C_T, NUM_TEMPLATES = network().evoformer, 12, 10, 6, 2
# (sequences, residues)
SIZES = [(13, 30), (9, 12)]

Sent = dict[tuple[str, str], tuple[int, float]]


def _sent(topology: Topology, block: nn.Module, *inputs: object) -> tuple[Sent, Sent]:
    """Calls and bytes in a block's forward and in its backward pass."""
    block = AxialBlock().apply(block, "block", ParameterTable(topology)).double()
    with CommLedger(topology) as forward:
        found = block(*inputs)
    outputs = found if isinstance(found, tuple) else (found,)
    with CommLedger(topology) as backward:
        sum((x.sum() for x in outputs), start=torch.zeros(())).backward()
    return tuple(
        {name: (entry.calls, entry.bytes) for name, entry in ledger.entries.items()}
        for ledger in (forward, backward)
    )


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def _blocks() -> list[tuple[Sent, Sent]]:
    topology = Topology(Layout(dist.get_world_size(), tp=dist.get_world_size()))
    axis, found = topology.axis("tp"), []
    for s, n in SIZES:
        mine, rows = (share_sizes(x, axis.size)[axis.rank] for x in (n, s))
        masks = Masks.of(torch.ones(s, n).double(), torch.ones(n, n).double())
        for is_extra in (False, True):
            block = EvoformerBlock(CONFIG, C_M, C_Z, is_extra=is_extra)
            m, z = _random(rows, n, C_M), _random(n, mine, C_Z)
            found.append(_sent(topology, block, m, z, masks))
        t = _random(NUM_TEMPLATES, mine, n, C_T)
        each = Masks.of(masks.msa, masks.pair.expand(NUM_TEMPLATES, n, n))
        found.append(_sent(topology, TemplatePairBlock(CONFIG, C_T), t, each))
    return found


@pytest.mark.parametrize("num_ranks", [3, 4])
def test_a_block_sends_what_the_formula_says(num_ranks: int) -> None:
    for rank, found in enumerate(launch(_blocks, num_ranks, timeout=120)):
        place = {"num_ranks": num_ranks, "rank": rank}
        expected = []
        for s, n in SIZES:
            block = block_traffic(CONFIG, C_M, C_Z, num_sequences=s, num_residues=n, **place)
            pairs = pair_traffic(CONFIG, C_T, num_residues=n, **place)
            expected += [(block, 5, 6), (block, 5, 6), (pairs * NUM_TEMPLATES, 3, 4)]
        for (forward, backward), (traffic, switches, gathers) in zip(found, expected, strict=True):
            switched = (switches, 8 * traffic.all_to_all)
            gathered = (gathers, pytest.approx(8 * traffic.all_gather, rel=1e-12))
            assert forward == {("all_to_all", "tp"): switched, ("all_gather", "tp"): gathered}
            assert backward == {("all_to_all", "tp"): switched, ("reduce_scatter", "tp"): gathered}


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_where_ranks_divide_it_is_the_formula_of_the_docs(num_ranks: int) -> None:
    s, n, config = 128, 256, CONFIG
    found = block_traffic(
        config, 256, 128, num_sequences=s, num_residues=n, num_ranks=num_ranks, rank=num_ranks - 1
    )
    heads = config.num_msa_heads + 2 * config.num_pair_heads
    switched = 2 * s * n * 256 + 2 * n * n * 128 + n * n * config.c_triangle
    gathered = n * n * (heads + 2 * config.c_triangle) + s * n * config.c_outer
    assert found == Traffic(
        all_to_all=switched * (num_ranks - 1) // num_ranks**2,
        all_gather=gathered * (num_ranks - 1) // num_ranks,
    )
