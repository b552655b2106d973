"""Data parallelism: which form each parameter takes, with groups of their own for experts.

Gradients are summed, never averaged: the loss is already divided by the tokens of the global
batch, and an expert sees tokens of ranks that are not in its group.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_map_only

from fivefold.parallel_core.data_parallel_config import WHOLE, DataParallelConfig
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.fsdp import ShardOptions, shard_module
from fivefold.parallel_core.parameters import ParameterTable
from fivefold.parallel_core.precision import Precision as Precision
from fivefold.parallel_core.precision import exact_names
from fivefold.parallel_core.replicas import Replicas
from fivefold.parallel_core.topology import Axis, Topology

_REPLICAS = "_fivefold_replicas"


def shard_data(
    model: nn.Module,
    table: ParameterTable,
    units: Iterable[str],
    precision: Precision,
    config: DataParallelConfig | None = None,
) -> None:
    """Lay parameters, gradients and optimizer state over the data axes, in place.

    Dense parameters go over "dp-cp", expert parameters over "edp".

    Args:
        model: with parameters already sharded over the model axes; may be on meta.
        table: its table, which learns what this rank updates of each parameter.
        units: names of the modules whose parameters go in one message (the layers).
        precision: dtypes.
        config: what is sharded; None is the default.

    Modules that the model's ``full_precision`` names (patterns as in a plan) compute in the storage
    dtype; a model that has some takes care of the dtypes of its inputs and in between.

    Raises:
        ConfigError: shards that do not fit the ranks, or ``full_precision`` under FSDP.
    """
    units, config = list(units), config or DataParallelConfig()
    laid = [_lay(model, table, data, precision, config) for data in ("edp", "dp-cp")]
    exact = exact_names(model) if precision.mixed else set()
    laid = [part for one in laid for part in one.split(exact)]
    for one in laid:
        table.set_copies(one.data, one.replicate)
    whole = [one for one in laid if one.form in WHOLE and one.names]
    make = partial(_replicate, model, table, units, precision=precision, overlap=config.overlap)
    replicas = [make(one) for one in whole if one.needed]
    setattr(model, _REPLICAS, replicas)
    if replicas and precision.mixed and not exact:
        _cast_inputs(model, units, precision.compute_dtype)
    gathered = [one for one in laid if one not in whole and one.needed and one.names]
    if gathered:
        _shard_fully(model, table.topology, gathered, units, precision)


@dataclass(frozen=True, slots=True, eq=False)
class _Laid:
    """One kind of parameters (dense or expert) and how it lies over its data axes."""

    data: str
    form: str
    names: list[str]
    shard: Axis
    replicate: Axis
    mixed: bool

    @property
    def needed(self) -> bool:
        """Whether there is anything to gather, to reduce or to cast."""
        return self.mixed or self.shard.size > 1 or self.replicate.size > 1

    def split(self, exact: set[str]) -> list["_Laid"]:
        """This kind as it is, or the parameters that are rounded and those that are not.

        Raises:
            ConfigError: the form cannot tell them apart.
        """
        rest = [name for name in self.names if name in exact]
        if not rest:
            return [self]
        if self.form not in WHOLE:
            raise ConfigError(
                f"the form {self.form!r} computes with one dtype, but {rest[0]} and "
                f"{len(rest) - 1} more are of modules that keep the stored one; choose one of "
                f"{', '.join(WHOLE)}"
            )
        rounded = [name for name in self.names if name not in exact]
        return [replace(self, names=rounded), replace(self, names=rest, mixed=False)]


def _lay(
    model: nn.Module,
    table: ParameterTable,
    data: str,
    precision: Precision,
    config: DataParallelConfig,
) -> _Laid:
    topology = table.topology
    size = config.shard_size_of(data, topology.size(data))
    # Neighbours share a copy: they lie within a node as far as the axis does.
    form = config.form_of(data)
    axis = topology.apart if config.overlap and form in WHOLE else topology.axis
    shard = axis(data if size == topology.size(data) else f"{data}%{size}")
    replicate = axis(data if size == 1 else f"{data}//{size}")
    names = [name for name, _ in model.named_parameters() if table[name].data == data]
    return _Laid(data, form, names, shard, replicate, precision.mixed)


# ---- whole parameters ------------------------------------------------------------------------


def _replicate(
    model: nn.Module,
    table: ParameterTable,
    units: Sequence[str],
    laid: _Laid,
    precision: Precision,
    overlap: bool,
) -> Replicas:
    replicas = Replicas(
        model,
        _buckets(laid.names, units),
        laid.shard,
        laid.replicate,
        storage=precision.storage_dtype,
        compute=precision.compute_dtype if laid.mixed else precision.storage_dtype,
        overlap=overlap,
    )
    for name in laid.names:
        table.set_mains(name, replicas)
    return replicas


def _buckets(names: Sequence[str], units: Sequence[str]) -> list[list[str]]:
    """The names below each unit, and the others."""
    buckets: dict[str, list[str]] = {}
    for name in names:
        unit = next((unit for unit in units if name.startswith(f"{unit}.")), "")
        buckets.setdefault(unit, []).append(name)
    return list(buckets.values())


def _cast_inputs(model: nn.Module, units: Sequence[str], dtype: torch.dtype) -> None:
    """Let modules see their inputs in the dtype of their parameters, as FSDP does."""

    def cast(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return tree_map_only(
            Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, (args, kwargs)
        )

    for module in (model, *(model.get_submodule(name) for name in units)):
        module.register_forward_pre_hook(cast, with_kwargs=True)


def _replicas_of(model: nn.Module) -> list[Replicas]:
    found: list[Replicas] = getattr(model, _REPLICAS, [])
    return found


def updated(model: nn.Module, name: str) -> nn.Parameter:
    """What the optimizer steps on for the parameter that ``model`` calls ``name``."""
    of = next((replicas for replicas in _replicas_of(model) if name in replicas), None)
    return model.get_parameter(name) if of is None else of.main(name)


def gather_mains(model: nn.Module) -> None:
    """Give whole parameters the values of what the ranks updated, before a step's forward."""
    for replicas in _replicas_of(model):
        replicas.gather()


def collect_gradients(model: nn.Module) -> None:
    """Take up gradients that a backward has set without autograd's hooks."""
    for replicas in _replicas_of(model):
        replicas.collect()


@torch.no_grad()
def add_gradients(model: nn.Module, gradients: Mapping[str, Tensor], scale: float) -> None:
    """Add gradients of one sample, weighed in the storage dtype, to what is reduced later.

    For steps that look at each sample's gradient by itself; ``torch.autograd.grad`` gives it.

    Args:
        model: with whole parameters.
        gradients: by the model's names.
        scale: the sample's weight.
    """
    parameters = dict(model.named_parameters())
    owners = {name: replicas for replicas in _replicas_of(model) for name in replicas.names}
    for name, gradient in gradients.items():
        if name in owners and owners[name].mixed:
            owners[name].add(name, gradient, scale)
        elif (so_far := parameters[name].grad) is not None:
            so_far.add_(gradient, alpha=scale)
        else:
            # In the parameter's own strides, as backward leaves it and fused optimizers need it.
            laid = torch.empty_like(parameters[name])
            parameters[name].grad = torch.mul(gradient, scale, out=laid)


def reduce_gradients(model: nn.Module) -> None:
    """Sum the gradients of whole parameters over the data axes, after a step's last backward."""
    for replicas in _replicas_of(model):
        replicas.reduce()


# ---- FSDP ------------------------------------------------------------------------------------


def _shard_fully(
    model: nn.Module,
    topology: Topology,
    gathered: Sequence[_Laid],
    units: Sequence[str],
    precision: Precision,
) -> None:
    mine = {name for one in gathered for name in one.names}
    options = {
        one.data: ShardOptions(
            shard=one.shard,
            replicate=one.replicate,
            reshard_after_forward=one.form == "zero3",
            compute=precision.compute_dtype if precision.mixed else None,
            reduce=precision.storage_dtype if precision.mixed else None,
            ignored={p for name, p in model.named_parameters() if name not in mine},
        )
        for one in gathered
    }
    of_model = options.get("dp-cp") or next(iter(options.values()))
    # Inner modules first: an outer one takes the parameters that are left.
    for one in gathered:
        if one.data == "edp":
            for module in _owners(model, one):
                shard_module(module, topology, options["edp"])
    if "dp-cp" in options:
        for name in units:
            shard_module(model.get_submodule(name), topology, options["dp-cp"])
    # Always, since schedules look at the model itself to know whether there is FSDP in it.
    shard_module(model, topology, of_model)


def _owners(model: nn.Module, experts: _Laid) -> list[nn.Module]:
    """The modules that own expert parameters.

    Raises:
        ConfigError: one owns other parameters too, which would be sharded like the experts'.
    """
    owners = {name.rpartition(".")[0] for name in experts.names}
    found = []
    for owner in sorted(owners):
        module = model.get_submodule(owner)
        others = {f"{owner}.{name}" for name, _ in module.named_parameters(recurse=False)}
        others -= set(experts.names)
        if others:
            raise ConfigError(
                f"{owner} owns expert parameters and {', '.join(sorted(others))}, which are not; "
                "FSDP shards a module's parameters alike, so keep them in modules of their own, "
                "or choose the forms 'replicate' or 'zero1'"
            )
        found.append(module)
    return found


def free_gathered(model: nn.Module) -> None:
    """Free the whole parameters that forward without backward leaves behind.

    They are copies, which would not follow a later change of the parameters.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def synchronise_last(model: nn.Module, last: bool) -> None:
    """Reduce gradients in this backward only if it is the last of the step's microbatches."""
    for replicas in _replicas_of(model) if last else ():
        replicas.expect_last()
    # No more than that: were FSDP told that a backward is not the last one, it would remember the
    # order of its modules, and prefetch some that are not needed again.
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
