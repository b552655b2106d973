"""Data parallelism on FSDP2, with shard groups of their own for dense and expert parameters."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from fivefold.parallel_core.config import Config
from fivefold.parallel_core.parameters import ParameterTable
from fivefold.parallel_core.topology import Topology

_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision(Config):
    """What is stored and what is computed in.

    Attributes:
        parameters: dtype of the stored parameters, of their gradients and of the optimizer.
        compute: dtype of the copies that forward and backward work with, and of activations.
        reshard_after_forward: free the gathered parameters after forward and gather them again
            in backward (ZeRO-3) instead of keeping them until backward (ZeRO-2).
    """

    parameters: Literal["float32", "float64"] = "float32"
    compute: Literal["float32", "float64", "bfloat16"] = "float32"
    reshard_after_forward: bool = False

    @property
    def storage_dtype(self) -> torch.dtype:
        """``parameters`` as a torch dtype."""
        return _DTYPES[self.parameters]

    @property
    def compute_dtype(self) -> torch.dtype:
        """``compute`` as a torch dtype."""
        return _DTYPES[self.compute]


def shard_data(
    model: nn.Module, table: ParameterTable, units: Iterable[str], precision: Precision
) -> None:
    """Shard parameters, gradients and optimizer state over the data axes, in place.

    Dense parameters go over "dp-cp", expert parameters over "edp". Gradients are summed, never
    averaged: the loss is already divided by the tokens of the global batch, and an expert sees
    tokens of ranks that are not in its group.

    Args:
        model: with parameters already sharded over the model axes; may be on meta.
        table: its table.
        units: names of the modules that are gathered as one (the layers).
        precision: dtypes and resharding.
    """
    topology = table.topology
    mixed = precision.compute_dtype != precision.storage_dtype
    experts = _experts(model, table)
    if not mixed and topology.size("dp-cp") == 1 and (not experts or topology.size("edp") == 1):
        return
    # One rank holds the whole of these, so there is nothing to gather or to reduce.
    whole = experts if not mixed and topology.size("edp") == 1 else []
    options = {
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=precision.compute_dtype if mixed else None,
            reduce_dtype=precision.storage_dtype if mixed else None,
        ),
        "reshard_after_forward": precision.reshard_after_forward,
        "ignored_params": {p for module in whole for p in module.parameters()},
    }
    layers = [(model.get_submodule(name), "dp-cp") for name in units]
    # Inner modules first: an outer one takes the parameters that are left.
    for module, axis in [*((m, "edp") for m in experts if not whole), *layers, (model, "dp-cp")]:
        _shard(module, topology, axis, options)


def _experts(model: nn.Module, table: ParameterTable) -> list[nn.Module]:
    """The modules that own parameters whose data axes are "edp"."""
    owners = {name.rpartition(".")[0] for name, row in table.items() if row.data == "edp"}
    return [module for name, module in model.named_modules() if name in owners]


def _shard(module: nn.Module, topology: Topology, axis: str, options: Mapping[str, Any]) -> None:
    size = topology.size(axis)
    sharded = fully_shard(
        module,
        mesh=topology.mesh(axis),
        shard_placement_fn=lambda parameter: Shard(_dim_to_shard(parameter.shape, size)),
        **options,
    )
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)


def _dim_to_shard(shape: torch.Size, size: int) -> int:
    """The first dim that divides evenly; dim 0, padded, where none does."""
    return next((dim for dim, n in enumerate(shape) if n % size == 0 and n > 0), 0)


def free_gathered(model: nn.Module) -> None:
    """Free the whole parameters that forward without backward leaves behind.

    They are copies, which would not follow a later change of the parameters.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def synchronise_last(model: nn.Module, last: bool) -> None:
    """Reduce gradients in this backward only if it is the last of the step's microbatches."""
    if isinstance(model, FSDPModule):
        model.set_is_last_backward(last)
        model.set_requires_gradient_sync(last)
