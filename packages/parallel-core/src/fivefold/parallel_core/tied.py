"""One parameter that stands in two places of a model, and in two stages of a pipeline.

An output layer that is the embedding again is the usual case: the first stage holds it as the
embedding and the last one as the output layer, and the gradient is the sum of both. The table knows
the two as one parameter: one name, one initialisation, one place in a checkpoint, counted once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fivefold.parallel_core.data_parallel import updated
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.parameters import ParameterTable, local_values


def tied_names(model: nn.Module) -> dict[str, str]:
    """Every later name of a parameter that ``model`` has under several, to the first of them."""
    first: dict[nn.Parameter, str] = {}
    return {
        name: first[parameter]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if first.setdefault(parameter, name) != name
    }


def check_ends(tied: Mapping[str, str], head: Sequence[str], tail: Sequence[str]) -> None:
    """Check that only the ends of a pipeline share parameters.

    Raises:
        ConfigError: another module does.
    """
    for name, original in tied.items():
        if original.partition(".")[0] not in head or name.partition(".")[0] not in tail:
            raise ConfigError(
                f"{name} and {original} are one parameter; stages of a pipeline can share what one "
                f"of {', '.join(head)} and one of {', '.join(tail)} have in common, nothing else"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Twin:
    """A tied parameter whose two stages are on one rank, as in V-shaped schedules.

    Each stage has its own module tree (and its own FSDP), so there are two tensors: the original,
    which is trained, and a copy that follows it.

    Attributes:
        table: of both stages.
        first: the part that has the original.
        original: its name there.
        last: the part that has the copy.
        copy: its name there.
    """

    table: ParameterTable
    first: nn.Module
    original: str
    last: nn.Module
    copy: str

    def _pair(self) -> tuple[nn.Parameter, nn.Parameter]:
        return updated(self.first, self.original), updated(self.last, self.copy)

    @torch.no_grad()
    def refresh(self) -> None:
        """Give the copy the values of the original."""
        original, copy = self._pair()
        local_values(copy).copy_(local_values(original))

    @torch.no_grad()
    def hand_over(self) -> None:
        """Add the copy's gradient to the original's."""
        original, copy = self._pair()
        if copy.grad is not None:
            original.grad = copy.grad if original.grad is None else original.grad.add_(copy.grad)
            copy.grad = None
