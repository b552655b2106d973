"""Applying a plan to a model, in the one order: model axes, recomputation, then data."""

from collections.abc import Sequence

from torch import nn

from fivefold.parallel_core.data_parallel import Precision, shard_data
from fivefold.parallel_core.data_parallel_config import DataParallelConfig
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.names import matching
from fivefold.parallel_core.parameters import ParameterTable
from fivefold.parallel_core.regions import recompute
from fivefold.parallel_core.styles import Plan, Style
from fivefold.parallel_core.topology import Topology


def parallelize(
    model: nn.Module,
    topology: Topology,
    plan: Plan,
    precision: Precision | None = None,
    table: ParameterTable | None = None,
    regions: str | Sequence[str] = "none",
    regions_on_request: str | Sequence[str] = "none",
    data_parallel: DataParallelConfig | None = None,
) -> ParameterTable:
    """Lay ``model`` over the ranks of ``topology``, in place.

    A parameter may be on meta (its values come later: ``parameters.initialise``, a checkpoint, or
    a released model's files) or real (it is cut down to this rank's piece).

    Args:
        model: with whole parameters; a pipeline stage keeps its global names.
        topology: the ranks.
        plan: module name pattern to style. Every parameter must fall under one style.
        precision: dtypes of training; None leaves parameters as they are and unsharded over the
            data axes, as inference wants them.
        table: the table to enter parameters in, for the second and later stages of one rank.
        regions: what backward recomputes; see ``recompute``.
        regions_on_request: what it recomputes besides where the forward pass asked for it.
        data_parallel: what of a trained model is sharded over the data axes; None is the default.

    Returns:
        The table of the model's parameters.

    Raises:
        ConfigError: a module under two patterns, a parameter under none, or a dim that does not
            divide.
    """
    table = ParameterTable(topology) if table is None else table
    for name, style in _matches(model, plan):
        parent, _, child = name.rpartition(".")
        replacement = style.apply(model.get_submodule(name), name, table)
        setattr(model.get_submodule(parent), child, replacement)
    tie(model)
    table.pieces(model)
    recompute(model, regions)
    recompute(model, regions_on_request, only_on_request=True)
    if precision is not None:
        shard_data(model, table, _units(model), precision, data_parallel)
    return table


def tie(model: nn.Module) -> None:
    """Make parameters that are one parameter the same object again, if the model has any.

    Cutting parameters down and moving them off the meta device make new objects.
    """
    method = getattr(model, "tie_weights", None)
    if callable(method):
        method()


def check_plan(model: nn.Module, plan: Plan) -> None:
    """Check that every pattern of a plan names a module of the whole ``model``.

    A seam under a wrong name would else keep the implementation for one device.

    Raises:
        ConfigError: a pattern that names none.
    """
    names = [name for name, _ in model.named_modules()]
    idle = set(plan).difference(*(matching(name, plan) for name in names))
    if idle:
        raise ConfigError(
            f"the plan's pattern(s) {', '.join(sorted(idle))} name no module of "
            f"{type(model).__name__}"
        )


def _matches(model: nn.Module, plan: Plan) -> list[tuple[str, Style]]:
    found = []
    for name, _ in model.named_modules():
        hits = matching(name, plan)
        if len(hits) > 1:
            raise ConfigError(
                f"module {name!r} falls under {len(hits)} patterns of the plan: "
                f"{', '.join(hits)}; it needs one"
            )
        if hits:
            found.append((name, plan[hits[0]]))
    return found


def _units(model: nn.Module) -> list[str]:
    """The members of the model's module lists and dicts: its layers."""
    return [
        f"{name}.{key}"
        for name, child in model.named_children()
        if isinstance(child, (nn.ModuleList, nn.ModuleDict))
        for key, _ in child.named_children()
    ]
