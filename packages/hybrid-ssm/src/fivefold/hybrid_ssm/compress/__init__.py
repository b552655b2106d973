"""MiniPuzzle: a smaller hybrid from a larger one (Nemotron-H, arXiv 2504.03624, section 3)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fivefold.hybrid_ssm.compress.config import CompressConfig, MemoryConfig
    from fivefold.hybrid_ssm.compress.pipeline import minipuzzle

__all__ = ["CompressConfig", "MemoryConfig", "minipuzzle"]

_HOMES = {"CompressConfig": "config", "MemoryConfig": "config", "minipuzzle": "pipeline"}


def __getattr__(name: str) -> Any:
    # On first use only: importing the package needs no torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
