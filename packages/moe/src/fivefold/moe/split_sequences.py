"""Whole sequences where ranks hold parts of them.

Over "cp" they are split as for attention, over "tp" into equal pieces of that.

Legend: B sequences, S tokens of a sequence here, L tokens of a whole sequence, K values of a token.
"""

from torch import Tensor

from fivefold.moe.capacity import WholeSequences
from fivefold.parallel_core.collectives import gather_along, piece_along
from fivefold.parallel_core.context import gather_held, take_held
from fivefold.parallel_core.sequence_split import Split
from fivefold.parallel_core.topology import Topology


class SplitSequences(WholeSequences):
    """Asks the ranks that share the sequences.

    Args:
        topology: the ranks.
        split: which positions a rank of "cp" holds.
    """

    def __init__(self, topology: Topology, split: Split):
        super().__init__()
        self.tp, self.cp, self.split = topology.axis("tp"), topology.axis("cp"), split
        self.num_parts = self.tp.size * self.cp.size

    def gather(self, x_bsk: Tensor) -> Tensor:
        """See ``WholeSequences.gather``; no gradient."""
        return gather_held(gather_along(x_bsk, self.tp, 1), self.cp, self.split)

    def take(self, x_blk: Tensor) -> Tensor:
        """See ``WholeSequences.take``."""
        held = take_held(x_blk, self.cp, self.split)
        return piece_along(held, self.tp, 1) if self.tp.size > 1 else held
