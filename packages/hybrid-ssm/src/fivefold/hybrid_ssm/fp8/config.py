"""What is computed in FP8, and how it is scaled."""

from dataclasses import dataclass
from typing import Literal

from fivefold.hybrid_ssm.errors import HybridConfigError
from fivefold.parallel_core.config import Config


@dataclass(frozen=True, kw_only=True, slots=True)
class FP8Config(Config):
    """Per-tensor current scaling of a hybrid's matrix products.

    Weights and activations are in E4M3. Every other product than those of the layers' projections
    (embedding, output layer, routers, convolutions, scans, attention's core) stays as it is.

    Attributes:
        first: how many of the first layers, or products, stay as they are.
        last: how many of the last.
        count: whether those are layers, as section 2.3 of the paper has it, or matrix products
            (GEMMs), as its introduction says. A layer has two products: the projections of one
            input count as one, and so do the products of all experts with their up or their down
            matrices.
        gradients: format of the gradients of results.
        power_of_2_scale: round scales down to powers of two.
        experts: whether routed experts are computed in FP8 too.
    """

    first: int = 4
    last: int = 4
    count: Literal["layers", "products"] = "layers"
    gradients: Literal["e5m2", "e4m3"] = "e5m2"
    power_of_2_scale: bool = False
    experts: bool = True

    def __post_init__(self) -> None:
        for name in ("first", "last"):
            if getattr(self, name) < 0:
                raise HybridConfigError(
                    f"{name} is {getattr(self, name)}; as many {self.count} stay as they are: 0 or "
                    "more"
                )
