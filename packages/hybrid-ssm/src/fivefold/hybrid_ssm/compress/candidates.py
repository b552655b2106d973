"""The grid of candidates, and those of them that the budget holds."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from torch import Tensor

from fivefold.hybrid_ssm.compress.config import MemoryConfig, SearchConfig
from fivefold.hybrid_ssm.compress.memory import Memory, memory_of, shown
from fivefold.hybrid_ssm.compress.prune import Candidate, best_layers, pruned_config
from fivefold.hybrid_ssm.config import HybridConfig
from fivefold.hybrid_ssm.errors import HybridConfigError
from fivefold.hybrid_ssm.pattern import ATTENTION, EXPERTS, LETTERS, MAMBA, MLP

MOST_COUNTS, NUM_WIDTHS = 7, 9


@dataclass(frozen=True, slots=True)
class Grid:
    """Values of each dimension of the search.

    Attributes:
        counts: numbers of layers of each kind that the parent has.
        widths: of feed-forward layers.
        experts: routed ones of a layer.
        mamba_heads: of a Mamba-2 layer.
    """

    counts: dict[str, tuple[int, ...]]
    widths: tuple[int, ...]
    experts: tuple[int, ...]
    mamba_heads: tuple[int, ...]

    @property
    def size(self) -> int:
        """Points of the grid."""
        total = len(self.widths) * len(self.experts) * len(self.mamba_heads)
        for values in self.counts.values():
            total *= len(values)
        return total


@dataclass(frozen=True, slots=True)
class Listed:
    """A candidate that the budget holds.

    Attributes:
        candidate: what stays.
        memory: that it needs.
    """

    candidate: Candidate
    memory: Memory


def grid_of(parent: HybridConfig, search: SearchConfig) -> Grid:
    """The grid, with defaults for what was left open.

    Raises:
        HybridConfigError: a value that the parent does not have.
    """
    asked = {
        ATTENTION: ("attention", search.attention),
        MAMBA: ("mamba", search.mamba),
        MLP: ("mlp", search.mlp),
        EXPERTS: ("moe", search.moe),
    }
    counts = {}
    for letter, (name, values) in asked.items():
        most = parent.pattern.count(letter)
        if most or values:
            found = _default_counts(most)
            counts[letter] = _within(name, values, found, 0, most, f"{letter!r} layers")
    heads = parent.num_mamba_heads
    sizes = (
        ("widths", search.widths, _default_widths(parent), parent.intermediate_size, MLP),
        ("experts", search.experts, (parent.num_experts,), parent.num_experts, EXPERTS),
        ("mamba_heads", search.mamba_heads, (heads,), heads, MAMBA),
    )  # fmt: skip
    found_sizes = [
        _within(name, values, default, 1, most, f"in its {letter!r} layers")
        if letter in parent.pattern
        else (most,)
        for name, values, default, most, letter in sizes
    ]
    return Grid(counts, *found_sizes)


def _default_counts(most: int) -> tuple[int, ...]:
    """From half of them to all, in even steps that give at most ``MOST_COUNTS`` values."""
    least = (most + 1) // 2
    step = max(-(-(most - least) // (MOST_COUNTS - 1)), 1)
    return tuple(range(most, least - 1, -step))[::-1]


def _default_widths(parent: HybridConfig) -> tuple[int, ...]:
    """Nine widths from three quarters to the whole, as 24576 to 32768 in the paper."""
    most = parent.intermediate_size
    return tuple(sorted({most - most * i // (4 * (NUM_WIDTHS - 1)) for i in range(NUM_WIDTHS)}))


def _within(
    name: str, values: tuple[int, ...], default: tuple[int, ...], least: int, most: int, what: str
) -> tuple[int, ...]:
    wrong = [value for value in values if not least <= value <= most]
    if wrong:
        raise HybridConfigError(
            f"search.{name} has {wrong[0]}; the parent has {most} {what}: from {least} to {most}"
        )
    return tuple(sorted(set(values))) or default


def points(parent: HybridConfig, layers: Tensor, grid: Grid) -> Iterator[Candidate]:
    """Every candidate of the grid; those without any layer are none.

    Args:
        parent: what candidates are parts of.
        layers: scores (L,), of which the highest of each kind stay.
        grid: the values.
    """
    letters = [letter for letter in LETTERS if letter in grid.counts]
    for counts in product(*(grid.counts[letter] for letter in letters)):
        kept = best_layers(parent, layers, dict(zip(letters, counts, strict=True)))
        if not kept:
            continue
        for width, experts, heads in product(grid.widths, grid.experts, grid.mamba_heads):
            yield Candidate(layers=kept, width=width, experts=experts, mamba_heads=heads)


def list_candidates(
    parent: HybridConfig,
    layers: Tensor,
    grid: Grid,
    memory: MemoryConfig,
    budget: float,
    least_use: float = 0.0,
) -> list[Listed]:
    """The candidates that need at most the budget, and at least a share of it.

    Those that lack all layers of a kind differ in nothing that its width says, and come once.

    Args:
        parent: what they are parts of.
        layers: scores (L,).
        grid: the values.
        memory: how memory is counted.
        budget: bytes.
        least_use: share of the budget.

    Raises:
        HybridConfigError: there are none; says how much the smallest and the largest need.
    """
    seen: dict[tuple[object, ...], Listed] = {}
    needs: list[float] = []
    for candidate in points(parent, layers, grid):
        config = pruned_config(parent, candidate)
        need = memory_of(config, memory)
        needs.append(need.total)
        if least_use * budget <= need.total <= budget:
            seen.setdefault(_key(config, candidate), Listed(candidate, need))
    if not seen:
        raise HybridConfigError(_nobody(needs, budget, least_use))
    return sorted(seen.values(), key=lambda each: -each.memory.total)


def _key(config: HybridConfig, candidate: Candidate) -> tuple[object, ...]:
    return (
        candidate.layers,
        candidate.width if MLP in config.pattern else 0,
        candidate.experts if EXPERTS in config.pattern else 0,
        candidate.mamba_heads if MAMBA in config.pattern else 0,
    )


def _nobody(needs: list[float], budget: float, least_use: float) -> str:
    start = f"none of the {len(needs)} candidates fits the budget of {shown(budget)}: "
    if min(needs) > budget:
        return (
            f"{start}the smallest needs {shown(min(needs))}; ask for at least that, or widen the "
            "grid: fewer layers, narrower ones, less context or fewer bits"
        )
    return (
        f"{start}they need from {shown(min(needs))} to {shown(max(needs))}, and none between "
        f"{shown(least_use * budget)} (least_use={least_use:g}) and the budget; lower least_use, "
        "or make the grid finer"
    )
