"""How the parameters of a new model start."""

import hashlib
import math

import torch
from torch import Tensor

from fivefold.hybrid_ssm.config import HybridConfig

_ONES = ("norm.weight", "heads.D")
_ZEROS = (".bias",)
DRAWN = ("heads.A_log", "heads.dt_bias")
"""Ends of the names of vectors that have distributions of their own."""


def rule(config: HybridConfig, name: str) -> tuple[str, float]:
    """How a parameter starts: ("ones", 0), ("zeros", 0) or ("normal", deviation).

    Taps are drawn so that the convolution keeps the size of its input, matrices that end a layer
    with a deviation smaller by the root of the number of layers, so that their sum does not grow.
    Those of ``DRAWN`` start at zero and are drawn by ``head_values``.
    """
    if name.endswith(DRAWN) or name.endswith(_ZEROS):
        return "zeros", 0.0
    if name.endswith(_ONES):
        return "ones", 0.0
    if ".conv_" in name:
        return "normal", config.conv_width**-0.5
    if name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight", "experts.down")):
        return "normal", config.initializer_range / math.sqrt(config.num_layers)
    return "normal", config.initializer_range


def head_values(config: HybridConfig, name: str, seed: int) -> Tensor:
    """First values of all heads (H,) of a layer's A_log or dt_bias, from the seed and the name.

    As in Mamba-2's own code: -A uniform in ``decay_range``, and a bias whose softplus is
    log-uniform between ``time_step_min`` and ``time_step_max`` (arXiv 2405.21060).
    """
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest))
    uniform_h = torch.rand(config.num_mamba_heads, generator=generator, dtype=torch.float64)
    if name.endswith("A_log"):
        low, high = config.decay_range
        return (low + uniform_h * (high - low)).log()
    low, high = math.log(config.time_step_min), math.log(config.time_step_max)
    dt_h = (low + uniform_h * (high - low)).exp().clamp(min=config.time_step_floor)
    return dt_h + (-torch.expm1(-dt_h)).log()
