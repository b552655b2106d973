"""What a style is, and cutting a parameter down to a rank's piece."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TypeVar

from torch import nn

from fivefold.parallel_core.collectives import piece_size
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.parameters import ParameterTable, Placement

M = TypeVar("M", bound=nn.Module)


class Style(ABC):
    """One way to lay a module over the ranks."""

    @abstractmethod
    def apply(self, module: nn.Module, name: str, table: ParameterTable) -> nn.Module:
        """The module to stand at ``name``; its parameters are entered in ``table``.

        Raises:
            ConfigError: the module is not of a kind this style knows, or does not divide.
        """

    def _expect(self, module: nn.Module, name: str, *kinds: type[M]) -> M:
        if not isinstance(module, kinds):
            known = " or ".join(kind.__name__ for kind in kinds)
            raise ConfigError(
                f"{type(self).__name__} at {name!r} needs a {known}, found {type(module).__name__}"
            )
        return module


Plan = Mapping[str, Style]
"""Module name pattern (``*`` stands for one part of a dotted name) to style."""


def shard_parameter(
    module: nn.Module, prefix: str, name: str, table: ParameterTable, placement: Placement
) -> None:
    """Cut parameter ``name`` of ``module`` down to this rank's piece and enter it in the table.

    Raises:
        ConfigError: a sharded dim is not a multiple of its axis.
    """
    parameter = module.get_parameter(name)
    local = parameter.detach()
    for dim, axis_name in placement.sharded:
        axis = table.topology.axis(axis_name)
        if local.shape[dim] % axis.size:
            raise ConfigError(
                f"{prefix}.{name} of shape {tuple(parameter.shape)}: dim {dim} of "
                f"{local.shape[dim]} cannot be split over {axis.name} of {axis.size} ranks; choose "
                f"a divisor of {local.shape[dim]}"
            )
        size = piece_size(local.shape[dim], axis)
        local = local.narrow(dim, axis.rank * size, size)
    if placement.sharded:
        # A copy, so that the whole parameter is freed.
        local = local.clone()
    setattr(module, name, nn.Parameter(local, requires_grad=parameter.requires_grad))
    table.add(f"{prefix}.{name}", placement)
