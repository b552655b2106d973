"""FP8 training as Nemotron-H had it, and files in FP8 (arXiv 2504.03624, section 2.3)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fivefold.hybrid_ssm.fp8.apply import recipe
    from fivefold.hybrid_ssm.fp8.config import FP8Config
    from fivefold.hybrid_ssm.fp8.files import calibrate, save_fp8

__all__ = ["FP8Config", "calibrate", "recipe", "save_fp8"]

_HOMES = {"FP8Config": "config", "calibrate": "files", "recipe": "apply", "save_fp8": "files"}


def __getattr__(name: str) -> Any:
    # On first use only: importing the package needs no torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
