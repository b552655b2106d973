"""Modules that become FP8 in place: by their class, with all that they hold."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.fp8.linears import FP8ColumnParallel, FP8Linear, FP8RowParallel, How
from fivefold.parallel_core.fp8.products import Products
from fivefold.parallel_core.fp8.scaling import Format
from fivefold.parallel_core.linear_group import LinearGroup
from fivefold.parallel_core.tensor_parallel import ColumnParallelLinears, RowParallelLinear
from fivefold.parallel_core.topology import Topology


@dataclass(frozen=True, slots=True)
class Conversion:
    """How modules become FP8, after they were split and wrapped.

    Attributes:
        format: how tensors are rounded.
        products: what computes.
        topology: the ranks that the model lies over; None where one holds all of it.
        experts: the FP8 form of each class of routed experts, which gets the attributes ``ranks``
            (an axis or None), ``format`` and ``products``.
    """

    format: Format
    products: Products
    topology: Topology | None = None
    experts: Mapping[type[nn.Module], type[nn.Module]] = field(default_factory=dict)

    def check(self, model: nn.Module) -> None:
        """Refuse to take parts of tensors for the whole of them.

        Raises:
            ConfigError: the model is split and the topology is missing.
        """
        kinds = (ColumnParallelLinears, RowParallelLinear)
        axes = [module.axis for module in model.modules() if isinstance(module, kinds)]
        split = next((axis for axis in axes if axis.size > 1), None)
        if split is not None and self.topology is None:
            raise ConfigError(
                f"the model lies over {split.name} of {split.size} ranks, and their topology is "
                "missing; give it: recipe(model, topology, ...)"
            )

    def change(self, module: nn.Module, name: str) -> None:
        """Make ``module`` compute in FP8.

        Raises:
            ConfigError: it has no FP8 form, or has it already.
        """
        kind = _kind(module)
        if kind is LinearGroup:
            for key, linear in module.named_children():
                self.change(linear, f"{name}.{key}")
        elif issubclass(kind, nn.Linear) and not issubclass(kind, FP8Linear):
            _become(module, FP8Linear, how=self._replicated())
        elif kind is ColumnParallelLinears:
            _become(module, FP8ColumnParallel, how=self._column(module))
        elif kind is RowParallelLinear:
            how = How(module.axis, self.format, self.products, x=True, weight=True)  # type: ignore[arg-type]
            _become(module, FP8RowParallel, how=how)
        elif kind in self.experts:
            ranks = None if self.topology is None else self.topology.axis("etp-ep")
            rest = {"ranks": ranks, "format": self.format, "products": self.products}
            _become(module, self.experts[kind], **rest)
        else:
            raise self._no_form(name, module)

    def _replicated(self) -> How:
        """Whole weights on every rank, which see parts of the sequence where there are several."""
        axis = None if self.topology is None else self.topology.axis("tp")
        return How(axis, self.format, self.products, x=True, y=True)

    def _column(self, module: Any) -> How:
        whole = module.sequence
        return How(
            module.axis, self.format, self.products, gather=whole, x=whole, weight=True, y=True
        )

    def _no_form(self, name: str, module: nn.Module) -> ConfigError:
        kinds = [nn.Linear, LinearGroup, ColumnParallelLinears, RowParallelLinear, *self.experts]
        names = [kind.__name__ for kind in kinds]
        return ConfigError(
            f"{name!r} is a {type(module).__name__}, which has no FP8 form; the recipe takes "
            f"{', '.join(names[:-1])} and {names[-1]}, once"
        )


def _kind(module: nn.Module) -> type[nn.Module]:
    """The module's class, or the one under a class of FSDP, which computes nothing itself."""
    kind: type[nn.Module] = type(module)
    wrapped = len(kind.__bases__) == 2 and "forward" not in vars(kind)
    return cast("type[nn.Module]", kind.__bases__[1]) if wrapped else kind


def _become(module: nn.Module, kind: type[nn.Module], **attributes: Any) -> None:
    """Change a module's class, and so what it computes; all it holds stays."""
    old = type(module)
    if _kind(module) is not old:
        rest = {key: value for key, value in vars(old).items() if key == "__deepcopy__"}
        kind = type(f"FSDP{kind.__name__}", (old.__bases__[0], kind), rest)
    module.__class__ = kind
    for name, value in attributes.items():
        setattr(module, name, value)
