"""How many tokens an expert takes: the configuration of a capacity.

Legend: T tokens that compete, K experts per token, E experts.
"""

import math
from dataclasses import dataclass
from typing import Literal

from fivefold.moe.errors import MoEConfigError
from fivefold.parallel_core.config import Config


@dataclass(frozen=True, kw_only=True, slots=True)
class CapacityConfig(Config):
    """How many copies of tokens each expert takes in training.

    Of T tokens that compete, each of the E experts takes ``ceil(factor * T * K / E)`` copies.

    Attributes:
        factor: 1 is what a balanced routing needs; None takes all and drops nothing.
        among: which tokens compete. "rank": those of a microbatch that a rank holds, which is the
            paper's sub-sequence dropping, needs no messages and depends on how the sequences are
            split; "sequence": those of each whole sequence, wherever they are, which is its
            full-sequence dropping and does not depend on the layout.
        keep: which copies stay: those with the largest weights ("weight"), or of the first tokens
            ("position"); of equal ones the earlier token's.
        pad: whether each expert gets exactly its capacity, with empty rows where there are fewer
            copies, so that shapes and messages have one size, known before the routing.

    Raises:
        MoEConfigError: a factor that is not above 0, or padding to no capacity.
    """

    factor: float | None = None
    among: Literal["rank", "sequence"] = "rank"
    keep: Literal["weight", "position"] = "weight"
    pad: bool = False

    def __post_init__(self) -> None:
        if self.factor is not None and not 0 < self.factor < math.inf:
            raise MoEConfigError(
                f"capacity.factor is {self.factor!r}; it must be above 0 and finite, or left out "
                "to drop nothing"
            )
        if self.pad and self.factor is None:
            raise MoEConfigError("capacity.pad is true without capacity.factor; give a factor")

    def rows(self, num_tokens: int, num_experts_per_token: int, num_experts: int) -> int:
        """Copies that each expert takes where ``num_tokens`` compete; at most one of each.

        Raises:
            MoEConfigError: there is no factor.
        """
        if self.factor is None:
            raise MoEConfigError("capacity.factor is not given, so an expert takes all")
        copies = num_tokens * num_experts_per_token * self.factor / num_experts
        # Not one row more because a product such as 0.1 * 30 is a little over 3.
        return min(num_tokens, math.ceil(copies * (1 - 1e-12)))
