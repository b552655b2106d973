"""Parameters that a narrower model keeps in float32."""

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn


class KeepsFloat32(nn.Module):
    """A module some of whose parameters stay in float32 when the model becomes narrower.

    Decays and time steps are exponents' arguments, and a router's bias is of large numbers with
    small differences: in bfloat16 both change what a model says.

    Attributes:
        wide: names of those parameters.
    """

    wide: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            if new.dtype.itemsize >= torch.float32.itemsize or not any(
                tensor is parameter for parameter in held
            ):
                return new
            return tensor.to(device=new.device, dtype=torch.float32)

        held: list[Any] = [self.get_parameter(name) for name in self.wide]
        applied: Self = super()._apply(keep, recurse)
        return applied
