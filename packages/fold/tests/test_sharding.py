"""Every parameter has its place."""

from fold_network import tiny_config

from fivefold.fold.model.alphafold import AlphaFold
from fivefold.fold.sharding import plan
from fivefold.parallel_core.plan import check_plan, parallelize
from fivefold.parallel_core.topology import Topology


def test_every_parameter_is_placed_whole() -> None:
    model = AlphaFold(tiny_config())
    check_plan(model, plan())
    table = parallelize(model, Topology.local(), plan())
    assert set(table) == {name for name, _ in model.named_parameters()}
    assert all(not table[name].sharded and not table[name].partial for name in table)
