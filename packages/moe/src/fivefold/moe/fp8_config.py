"""What is computed in FP8."""

from dataclasses import dataclass
from typing import Literal

from fivefold.moe.errors import MoEConfigError
from fivefold.parallel_core.config import Config


@dataclass(frozen=True, kw_only=True, slots=True)
class FP8Config(Config):
    """Per-tensor current scaling of the matrix products of a model's layers.

    Weights and activations are in E4M3. Embedding, output layer, routers, gates of shared experts
    and attention's core stay as they are.

    Attributes:
        first: how many of the first layers stay as they are.
        last: how many of the last.
        gradients: format of the gradients of results.
        power_of_2_scale: round scales down to powers of two.
        experts: whether routed experts are computed in FP8 too.
    """

    first: int = 0
    last: int = 0
    gradients: Literal["e5m2", "e4m3"] = "e5m2"
    power_of_2_scale: bool = False
    experts: bool = True

    def __post_init__(self) -> None:
        for name in ("first", "last"):
            if getattr(self, name) < 0:
                raise MoEConfigError(
                    f"{name} is {getattr(self, name)}; as many layers stay as they are: 0 or more"
                )

    def check(self, num_layers: int) -> None:
        """Check that a model has layers left for FP8.

        Raises:
            MoEConfigError: it has none.
        """
        if self.first + self.last >= num_layers:
            raise MoEConfigError(
                f"first={self.first} and last={self.last} leave none of the {num_layers} layers "
                f"for FP8; together they must be below {num_layers}"
            )
