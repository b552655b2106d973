"""FLOPs of products of matrices, two for each multiplication (arXiv 2205.05198, appendix A)."""

from typing import Literal

from fivefold.parallel_core.planner.models import PARTS, ModelShape, Part
from fivefold.parallel_core.planner.setup import Recompute

Mode = Literal["paper", "exact"]
"""Recomputed attention is counted three times by the paper's equation 8, and once in "exact"."""


def core_flops(model: ModelShape, length: int, causal: bool) -> float:
    """Forward FLOPs of a token in the core of one attention; half of them under ``causal``."""
    whole = 4 * length * model.num_heads * model.head_width
    return whole / 2 if causal else whole


def part_flops(model: ModelShape, part: Part) -> float:
    """Forward FLOPs of a token in the weights of a part of a layer, and in Mamba's scan."""
    h, gate = model.hidden, 3 if model.gated else 2
    if part == "attention":
        return 4 * h * model.head_width * (model.num_heads + model.kv_heads)
    if part == "mlp":
        return 2 * gate * h * model.inner
    if part == "moe" and model.experts is not None:
        experts = model.experts
        inner = experts.top_k * experts.ffn + experts.shared_ffn
        return 2 * gate * h * inner + 2 * h * experts.num_experts
    return _mamba_flops(model)


def _mamba_flops(model: ModelShape) -> float:
    mamba = model.mamba
    if mamba is None:
        return 0
    inner = mamba.num_heads * mamba.head_dim
    shared = 2 * mamba.num_groups * mamba.state
    projections = 2 * model.hidden * (3 * inner + shared + mamba.num_heads)
    # Inside chunks C.B and its product with the values; the states written and read.
    scan = 2 * mamba.chunk * (mamba.num_groups * mamba.state + inner) + 4 * inner * mamba.state
    return projections + scan


def layer_flops(model: ModelShape, letter: str, length: int, causal: bool = False) -> float:
    """Forward FLOPs of a token in one layer."""
    total = sum(part_flops(model, part) for part in PARTS[letter])
    return total + ("attention" in PARTS[letter]) * core_flops(model, length, causal)


def _forward(model: ModelShape, length: int, causal: bool) -> tuple[float, float, float]:
    """Forward FLOPs of a token: in all layers, in the head, and in the cores among the layers."""
    layers = sum(
        model.layers.count(letter) * layer_flops(model, letter, length, causal) for letter in PARTS
    )
    num_cores = sum("attention" in PARTS[letter] for letter in model.layers)
    cores = num_cores * core_flops(model, length, causal)
    return layers, 2 * model.hidden * model.vocabulary, cores


def model_flops(model: ModelShape, length: int, batch: int, causal: bool = False) -> float:
    """Of one step on ``batch`` sequences, forward and backward: equation 7."""
    layers, head, _ = _forward(model, length, causal)
    return 3 * (layers + head) * length * batch


def hardware_flops(
    model: ModelShape,
    length: int,
    batch: int,
    recompute: Recompute,
    mode: Mode = "exact",
    causal: bool = False,
) -> float:
    """Of one step with what is recomputed: equation 8 in mode "paper" for "selective"."""
    layers, head, cores = _forward(model, length, causal)
    again = {"none": 0.0, "selective": cores * (3 if mode == "paper" else 1), "full": layers}
    return (3 * (layers + head) + again[recompute]) * length * batch


def utilisation(flops: float, seconds: float, num_ranks: int, peak: float) -> float:
    """Share of the peak FLOP/s of all ranks that a step reached."""
    return flops / (seconds * num_ranks * peak)
