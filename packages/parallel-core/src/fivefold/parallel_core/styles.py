"""The ways in which a plan lays one module over the ranks.

A style takes a module with whole parameters and gives the module that stands in its place on this
rank: same attribute, same parameter names, local parameters, collectives inside. It enters every
parameter it touches in the table.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from fivefold.parallel_core.collectives import sum_over
from fivefold.parallel_core.context_styles import ContextPositions, SplitContext
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.linear_group import LinearGroup
from fivefold.parallel_core.losses import CrossEntropy
from fivefold.parallel_core.parameters import ParameterTable, Placement
from fivefold.parallel_core.rng import in_own_stream
from fivefold.parallel_core.style import Plan, Style, shard_parameter
from fivefold.parallel_core.tensor_parallel import (
    ColumnParallelLinears,
    RowParallelLinear,
    VocabParallelCrossEntropy,
    VocabParallelEmbedding,
)
from fivefold.parallel_core.topology import Axis

__all__ = [
    "ColumnParallel",
    "ContextPositions",
    "Plan",
    "Replicate",
    "RowParallel",
    "SplitContext",
    "SplitRandom",
    "Style",
    "SumOver",
    "VocabParallel",
    "VocabParallelLoss",
    "head_copies",
    "pad_rows",
    "rows_with_copies",
    "shard_parameter",
]


def _placement(
    parameter: nn.Parameter, sharded: tuple[tuple[int, str], ...] = (), **kwargs: object
) -> Placement:
    return Placement(shape=tuple(parameter.shape), sharded=sharded, **kwargs)  # type: ignore[arg-type]


def _partial(axis: Axis, sequence: bool) -> tuple[str, ...]:
    return (axis.name,) if sequence and axis.size > 1 else ()


@dataclass(frozen=True)
class Replicate(Style):
    """Whole parameters on every rank of the model axes.

    Attributes:
        sequence: the module sees only this rank's part of each sequence (sequence parallelism),
            so that each rank's gradient is a part of the sum.
        axis: the axis that splits the sequence.
    """

    sequence: bool = True
    axis: str = "tp"

    def apply(self, module: nn.Module, name: str, table: ParameterTable) -> nn.Module:
        """Enter every parameter below ``module``, unchanged."""
        partial = _partial(table.topology.axis(self.axis), self.sequence)
        for key, parameter in module.named_parameters():
            table.add(f"{name}.{key}", _placement(parameter, partial=partial))
        return module


@dataclass(frozen=True)
class ColumnParallel(Style):
    """Output features split over ``axis``: for ``nn.Linear`` or ``LinearGroup``.

    With ``sequence`` the input is this rank's part of the sequence (dim 1). It is gathered once
    for all linears of a group, only the part is kept for backward, and it is gathered again there
    (arXiv 2205.05198, section 4.2.2); backward ends in a reduce-scatter. Without, the input is
    whole and backward ends in an all-reduce.

    Attributes:
        heads: number of heads that the output of a linear consists of, by its name in the group
            (``""`` is a single linear). A head stays whole: where there are fewer than ranks,
            neighbours hold copies of one, and each has a part of its gradient. The keys and values
            of grouped queries need it; a linear that is not named is split by features.
    """

    sequence: bool = True
    axis: str = "tp"
    heads: Mapping[str, int] = field(default_factory=dict, hash=False)

    def apply(self, module: nn.Module, name: str, table: ParameterTable) -> nn.Module:
        """Split the weight's rows and the bias."""
        self._expect(module, name, nn.Linear, LinearGroup)
        axis = table.topology.axis(self.axis)
        linears = {"": module} if isinstance(module, nn.Linear) else dict(module.named_children())
        for key, linear in linears.items():
            prefix = f"{name}.{key}" if key else name
            copies = head_copies(self.heads[key], axis, prefix) if key in self.heads else 1
            sharded, partial = rows_with_copies(axis, copies)
            for parameter, value in list(linear.named_parameters()):
                placement = _placement(value, sharded, partial=partial)
                shard_parameter(linear, prefix, parameter, table, placement)
        return ColumnParallelLinears.of(module, axis, self.sequence)


def head_copies(num_heads: int, axis: Axis, name: str) -> int:
    """How many neighbours along ``axis`` hold each head: 1 where there are enough for all ranks.

    Raises:
        ConfigError: neither divides the other.
    """
    if num_heads % axis.size == 0:
        return 1
    if num_heads < 1 or axis.size % num_heads:
        raise ConfigError(
            f"{name} of {num_heads} heads cannot be split over {axis.name} of {axis.size} ranks; "
            f"choose a divisor or a multiple of {num_heads}"
        )
    return axis.size // num_heads


def rows_with_copies(
    axis: Axis, copies: int
) -> tuple[tuple[tuple[int, str], ...], tuple[str, ...]]:
    """Where rows are sharded and where their gradient is partial, with so many copies of each.

    Args:
        axis: the ranks.
        copies: see ``head_copies``.
    """
    if copies == 1:
        return ((0, axis.name),), ()
    if copies == axis.size:
        return (), (axis.name,)
    return ((0, f"{axis.name}//{copies}"),), (f"{axis.name}%{copies}",)


@dataclass(frozen=True)
class RowParallel(Style):
    """Input features of an ``nn.Linear`` split over ``axis``; the parts are summed.

    With ``sequence`` the sum is reduce-scattered along the sequence (dim 1), else all-reduced.
    """

    sequence: bool = True
    axis: str = "tp"

    def apply(self, module: nn.Module, name: str, table: ParameterTable) -> nn.Module:
        """Split the weight's columns; a bias stays whole."""
        self._expect(module, name, nn.Linear)
        axis = table.topology.axis(self.axis)
        weight = module.get_parameter("weight")
        shard_parameter(module, name, "weight", table, _placement(weight, ((1, self.axis),)))
        if getattr(module, "bias", None) is not None:
            bias = module.get_parameter("bias")
            partial = _partial(axis, self.sequence)
            table.add(f"{name}.bias", _placement(bias, partial=partial))
        return RowParallelLinear.of(module, axis, self.sequence)


def pad_rows(parameter: nn.Parameter, multiple: int) -> nn.Parameter:
    """The parameter with zero rows added until they are a multiple of ``multiple``."""
    missing = -parameter.shape[0] % multiple
    padded = nn.functional.pad(parameter.detach(), (0, 0) * (parameter.dim() - 1) + (0, missing))
    return nn.Parameter(padded, requires_grad=parameter.requires_grad)


@dataclass(frozen=True)
class VocabParallel(Style):
    """The vocabulary split over ``axis``: for ``nn.Embedding`` and for the output ``nn.Linear``.

    The vocabulary is padded with zero rows to a multiple of ``multiple`` × ranks; the table keeps
    the true shape, so checkpoints and exports never see the padding.
    """

    sequence: bool = True
    axis: str = "tp"
    multiple: int = 1

    def apply(self, module: nn.Module, name: str, table: ParameterTable) -> nn.Module:
        """Pad and split the weight's rows and the bias."""
        self._expect(module, name, nn.Linear, nn.Embedding)
        axis = table.topology.axis(self.axis)
        for key, whole in list(module.named_parameters()):
            setattr(module, key, pad_rows(whole, axis.size * self.multiple))
            shard_parameter(module, name, key, table, _placement(whole, ((0, self.axis),)))
        if isinstance(module, nn.Embedding):
            _check_options(module, name)
            return VocabParallelEmbedding(module.get_parameter("weight"), axis, self.sequence)
        return ColumnParallelLinears.of(module, axis, self.sequence)


def _check_options(embedding: nn.Embedding, name: str) -> None:
    """Refuse what the parallel embedding would leave out."""
    for option in ("padding_idx", "max_norm", "scale_grad_by_freq", "sparse"):
        value = getattr(embedding, option)
        if value is not None and value is not False:
            raise ConfigError(
                f"VocabParallel at {name!r}: the embedding has {option}={value}, which only "
                "torch's own embedding knows; make it without"
            )


@dataclass(frozen=True)
class VocabParallelLoss(Style):
    """Cross entropy of logits whose vocabulary is split over ``axis``.

    Attributes:
        vocab_size: number of true ids; logits of padding rows are left out.
    """

    vocab_size: int
    axis: str = "tp"

    def apply(self, module: nn.Module, name: str, table: ParameterTable) -> nn.Module:
        """Swap the loss."""
        loss = self._expect(module, name, CrossEntropy)
        return VocabParallelCrossEntropy.of(loss, table.topology.axis(self.axis), self.vocab_size)


@dataclass(frozen=True)
class SplitRandom(Style):
    """A module without parameters whose random numbers differ over ``axis``, such as dropout.

    Where activations are split over "tp": heads, features, or tokens under sequence parallelism.
    Where they are replicated, ranks must draw alike and the plan needs no entry; see ``rng``.
    """

    axis: str = "tp"

    def apply(self, module: nn.Module, name: str, table: ParameterTable) -> nn.Module:
        """Change what the module draws, in place."""
        return in_own_stream(module, table.topology.axis(self.axis))


class _SumOver(nn.Module):
    def __init__(self, axis: Axis):
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        return sum_over(x, self.axis)


@dataclass(frozen=True)
class SumOver(Style):
    """A seam that passes a count through becomes the count's sum over ``axis``; no gradient."""

    axis: str

    def apply(self, module: nn.Module, name: str, table: ParameterTable) -> nn.Module:
        """Swap the identity."""
        self._expect(module, name, nn.Identity)
        return _SumOver(table.topology.axis(self.axis))
