"""What parameters are stored in and what is computed in."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from fivefold.parallel_core.config import Config
from fivefold.parallel_core.names import matching

_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision(Config):
    """What is stored and what is computed in.

    Attributes:
        parameters: dtype of the stored parameters, of their gradients and of the optimizer.
        compute: dtype of the copies that forward and backward work with, and of activations.
    """

    parameters: Literal["float32", "float64"] = "float32"
    compute: Literal["float32", "float64", "bfloat16"] = "float32"

    @property
    def storage_dtype(self) -> torch.dtype:
        """``parameters`` as a torch dtype."""
        return _DTYPES[self.parameters]

    @property
    def compute_dtype(self) -> torch.dtype:
        """``compute`` as a torch dtype."""
        return _DTYPES[self.compute]

    @property
    def mixed(self) -> bool:
        """Whether the two dtypes differ."""
        return self.parameters != self.compute


def exact_names(model: nn.Module) -> set[str]:
    """Parameters of the modules that the model's ``full_precision`` patterns name.

    Such a model casts its inputs itself, where they may lose digits.
    """
    patterns: Sequence[str] = getattr(model, "full_precision", ())
    owners = [name for name, _ in model.named_modules() if matching(name, patterns)]
    return {
        f"{owner}.{name}"
        for owner in owners
        for name, _ in model.get_submodule(owner).named_parameters()
    }
