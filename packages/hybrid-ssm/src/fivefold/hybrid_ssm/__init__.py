"""Mamba-2, attention and MLP hybrids: Nemotron-H (arXiv 2504.03624)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fivefold.hybrid_ssm.cache import HybridCache
    from fivefold.hybrid_ssm.config import HybridConfig
    from fivefold.hybrid_ssm.errors import HybridError
    from fivefold.hybrid_ssm.model import HybridForCausalLM

__all__ = ["HybridCache", "HybridConfig", "HybridError", "HybridForCausalLM"]

_HOMES = {
    "HybridCache": "cache",
    "HybridConfig": "config",
    "HybridError": "errors",
    "HybridForCausalLM": "model",
}


def __getattr__(name: str) -> Any:
    # On first use only: the command's --help and the configuration need no torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
