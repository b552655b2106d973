"""Which microbatches of a pipeline are stored and which are recomputed, under a byte budget.

Korthikanti et al., arXiv 2205.05198, appendix C: memory is filled with microbatches whose
activations are stored, and the others are checkpointed. When the backward of a stored one has freed
its memory, the next one that enters may be stored, so the stored ones are a window that moves
through the step.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from fivefold.parallel_core.in_flight import Order

Chunk = tuple[int, int]
"""Index of a stage, and of a microbatch in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageBytes:
    """What autograd keeps of one microbatch of a stage between its forward and its backward.

    Attributes:
        stored: bytes if nothing more is recomputed than the model's regions say.
        recomputed: bytes if its layers are recomputed.
    """

    stored: int
    recomputed: int


def choose_stored(order: Order, sizes: Mapping[int, StageBytes], budget: int) -> frozenset[Chunk]:
    """The microbatches of a rank's stages that it can store, chosen one by one as they enter.

    One is stored if what is stored already, it itself, and everything else as recomputed fit the
    budget until its backward is done.

    Args:
        order: what the rank does in a step.
        sizes: of each of its stages.
        budget: bytes of activations on the rank.

    Returns:
        What is stored; nothing where not even recomputing everything fits.
    """
    ends = {(a.stage, a.microbatch): i for i, a in enumerate(order) if a.kind in "BW"}
    used = _levels(order, sizes, ())
    stored: set[Chunk] = set()
    for start, action in enumerate(order):
        if action.kind != "F":
            continue
        size, chunk = sizes[action.stage], (action.stage, action.microbatch)
        more, end = size.stored - size.recomputed, ends[chunk]
        if max(used[start:end]) + more <= budget:
            stored.add(chunk)
            for i in range(start, end):
                used[i] += more
    return frozenset(stored)


def window_peak(order: Order, sizes: Mapping[int, StageBytes], stored: Collection[Chunk]) -> int:
    """The most bytes of activations that a rank holds at once.

    Args:
        order: what the rank does in a step.
        sizes: of each of its stages.
        stored: microbatches of its stages that are stored; the others are recomputed.
    """
    return max(_levels(order, sizes, stored))


def _levels(order: Order, sizes: Mapping[int, StageBytes], stored: Collection[Chunk]) -> list[int]:
    """Bytes held after each action."""
    live, levels = 0, []
    for action in order:
        size = sizes[action.stage]
        chunk = (action.stage, action.microbatch)
        held = size.stored if chunk in stored else size.recomputed
        # Between the two parts of a backward all counts as held; nearly all of it is.
        live += {"F": held, "I": 0}.get(action.kind, -held)
        levels.append(live)
    return levels
