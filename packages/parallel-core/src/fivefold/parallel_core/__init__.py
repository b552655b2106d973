"""Five-dimensional parallelism for torch, from the arithmetic of ranks to the training loop."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fivefold.parallel_core.activations import ActivationLedger
    from fivefold.parallel_core.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        LayoutError,
        ParallelError,
        RankError,
    )
    from fivefold.parallel_core.launcher import launch
    from fivefold.parallel_core.layout import Layout
    from fivefold.parallel_core.ledger import CommLedger
    from fivefold.parallel_core.parameters import ParameterTable
    from fivefold.parallel_core.plan import parallelize
    from fivefold.parallel_core.regions import recompute
    from fivefold.parallel_core.topology import Topology

__all__ = [
    "ActivationLedger",
    "CheckpointError",
    "CommLedger",
    "ConfigError",
    "DataError",
    "Layout",
    "LayoutError",
    "ParallelError",
    "ParameterTable",
    "RankError",
    "Topology",
    "launch",
    "parallelize",
    "recompute",
]

_HOMES = {
    "ActivationLedger": "activations",
    "CheckpointError": "errors",
    "CommLedger": "ledger",
    "ConfigError": "errors",
    "DataError": "errors",
    "Layout": "layout",
    "LayoutError": "errors",
    "ParallelError": "errors",
    "ParameterTable": "parameters",
    "RankError": "errors",
    "Topology": "topology",
    "launch": "launcher",
    "parallelize": "plan",
    "recompute": "regions",
}


def __getattr__(name: str) -> Any:
    # On first use only: arithmetic of ranks and configuration need no torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    # Kept, so that the next use finds it at once.
    globals()[name] = value
    return value
