"""The sizes on one rank that a layer's activations and messages follow from."""

from dataclasses import dataclass

from fivefold.parallel_core.planner.setup import Recompute, Setup

Terms = dict[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Local:
    """The sizes that one layer's activations follow from.

    Attributes:
        microbatch: sequences.
        length: tokens of a whole sequence.
        tp, cp, ep, etp: sizes of the axes.
        sequence: split along the sequence between tensor-parallel layers.
        element_size: bytes of an activation.
        recompute: what is not kept.
        imbalance: rows of the busiest expert rank over the mean.
    """

    microbatch: int
    length: int
    tp: int
    cp: int
    ep: int
    etp: int
    sequence: bool
    element_size: int
    recompute: Recompute
    imbalance: float

    @classmethod
    def of(cls, setup: Setup) -> "Local":
        """The part of a setup that layers see."""
        return cls(**{name: getattr(setup, name) for name in cls.__dataclass_fields__})

    @property
    def tokens(self) -> int:
        """Rows inside tensor-parallel layers."""
        return self.microbatch * self.length // self.cp

    @property
    def rows(self) -> int:
        """Rows between tensor-parallel layers."""
        return self.tokens // self.tp if self.sequence else self.tokens
