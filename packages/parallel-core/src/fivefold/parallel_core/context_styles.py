"""The styles that lay attention, and other mixers, over a split sequence."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from fivefold.parallel_core.context import (
    GatheredContext,
    HeadsContext,
    SplitMixer,
    SplitPositions,
)
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.parameters import ParameterTable
from fivefold.parallel_core.ring import RingContext
from fivefold.parallel_core.rng import in_own_stream
from fivefold.parallel_core.sequence_split import Split
from fivefold.parallel_core.style import Style

CONTEXT_FORMS: Mapping[str, type[SplitMixer]] = {
    "gather": GatheredContext,
    "ring": RingContext,
    "heads": HeadsContext,
}


@dataclass(frozen=True)
class SplitContext(Style):
    """Attention, or another mixer, over a sequence that is split over "cp".

    Attributes:
        form: of attention "gather" (all keys and values are gathered), "ring" (they pass by; the
            core needs ``partial``) or "heads" (tokens are exchanged for heads); of another mixer,
            or for another way, a ``SplitMixer`` class.
        split: how the sequence is split; ``ContextPositions`` and the data need the same.
        random: the axis that splits the heads, where the core draws random numbers (dropout of
            probabilities): then it does as under ``SplitRandom``.
    """

    form: str | type[SplitMixer] = "gather"
    split: Split = "contiguous"
    axis: str = "cp"
    random: str | None = None

    def apply(self, module: nn.Module, name: str, table: ParameterTable) -> nn.Module:
        """Wrap the core of a mixer."""
        kind = CONTEXT_FORMS.get(self.form) if isinstance(self.form, str) else self.form
        if kind is None:
            raise ConfigError(
                f"SplitContext at {name!r}: the form is one of {', '.join(CONTEXT_FORMS)}; found "
                f"{self.form!r}"
            )
        if issubclass(kind, RingContext) and not callable(getattr(module, "partial", None)):
            raise ConfigError(
                f"SplitContext at {name!r}: a ring needs a core with partial(q, k, v, offset), "
                f"which {type(module).__name__} has not; use 'gather' or 'heads'"
            )
        held = [key for key, _ in module.named_parameters()]
        if held:
            raise ConfigError(
                f"SplitContext at {name!r} wraps {type(module).__name__}, which would rename its "
                f"parameter(s) {', '.join(held)}; they belong to a module beside it"
            )
        if self.random is not None:
            in_own_stream(module, table.topology.axis(self.random))
        axis = table.topology.axis(self.axis)
        return kind(module, axis, self.split) if axis.size > 1 else module


@dataclass(frozen=True)
class ContextPositions(Style):
    """Positions of a sequence that is split over "cp"."""

    split: Split = "contiguous"
    axis: str = "cp"

    def apply(self, module: nn.Module, name: str, table: ParameterTable) -> nn.Module:
        """Wrap the positions seam."""
        axis = table.topology.axis(self.axis)
        return SplitPositions(module, axis, self.split) if axis.size > 1 else module
