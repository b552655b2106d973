"""Mixture-of-experts language models under MoE Parallel Folding (arXiv 2504.14960)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fivefold.moe.config import MoEConfig
    from fivefold.moe.dispatch import TokenDispatcher
    from fivefold.moe.errors import MoEError
    from fivefold.moe.experts import Experts
    from fivefold.moe.layer import MoELayer
    from fivefold.moe.model import MoEForCausalLM
    from fivefold.moe.router import Router

__all__ = [
    "Experts",
    "MoEConfig",
    "MoEError",
    "MoEForCausalLM",
    "MoELayer",
    "Router",
    "TokenDispatcher",
]

_HOMES = {
    "Experts": "experts",
    "MoEConfig": "config",
    "MoEError": "errors",
    "MoEForCausalLM": "model",
    "MoELayer": "layer",
    "Router": "router",
    "TokenDispatcher": "dispatch",
}


def __getattr__(name: str) -> Any:
    # On first use only: the command's --help and the configuration need no torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
