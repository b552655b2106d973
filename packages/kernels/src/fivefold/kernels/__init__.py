"""Fused ops for training large models, each with a reference that is its specification."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fivefold.kernels.errors import BackendError, CompileError, KernelError, KernelInputError
    from fivefold.kernels.layers import Linear
    from fivefold.kernels.ops.attention import attention
    from fivefold.kernels.ops.cross_entropy import cross_entropy
    from fivefold.kernels.ops.fp8_linear import fp8_linear
    from fivefold.kernels.ops.fp8_quantize import fp8_quantize
    from fivefold.kernels.ops.grouped_mm import grouped_mm
    from fivefold.kernels.ops.layer_norm import layer_norm
    from fivefold.kernels.ops.linear import linear
    from fivefold.kernels.ops.linear_cross_entropy import linear_cross_entropy
    from fivefold.kernels.ops.relu2 import relu2
    from fivefold.kernels.ops.rms_norm import rms_norm
    from fivefold.kernels.ops.rotary import rotary
    from fivefold.kernels.ops.swiglu import swiglu
    from fivefold.kernels.optimizer import FusedAdamW

__all__ = [
    "BackendError",
    "CompileError",
    "FusedAdamW",
    "KernelError",
    "KernelInputError",
    "Linear",
    "attention",
    "cross_entropy",
    "fp8_linear",
    "fp8_quantize",
    "grouped_mm",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "relu2",
    "rms_norm",
    "rotary",
    "swiglu",
]

_HOMES = {
    "BackendError": "errors",
    "CompileError": "errors",
    "FusedAdamW": "optimizer",
    "KernelError": "errors",
    "KernelInputError": "errors",
    "Linear": "layers",
}


def __getattr__(name: str) -> Any:
    # On first use only: the command's --help needs no torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES.get(name, f"ops.{name}")
    return getattr(import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
