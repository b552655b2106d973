"""AlphaFold 2, trained as in ScaleFold (arXiv 2404.11068)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fivefold.fold.config import AlphaFoldConfig, LossConfig
    from fivefold.fold.errors import FoldError
    from fivefold.fold.losses.total import alphafold_loss
    from fivefold.fold.model.alphafold import AlphaFold
    from fivefold.fold.presets import preset

__all__ = [
    "AlphaFold",
    "AlphaFoldConfig",
    "FoldError",
    "LossConfig",
    "alphafold_loss",
    "preset",
]

_HOMES = {
    "AlphaFold": "model.alphafold",
    "AlphaFoldConfig": "config",
    "FoldError": "errors",
    "LossConfig": "config",
    "alphafold_loss": "losses.total",
    "preset": "presets",
}


def __getattr__(name: str) -> Any:
    # On first use only: the command's --help and the configuration need no torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
