"""Parameters that one rank holds of a layer: those that data ranks share, and the experts'."""

from functools import lru_cache
from typing import NamedTuple

from fivefold.parallel_core.planner.models import PARTS, ModelShape, Part


class Count(NamedTuple):
    """Numbers of parameters: of experts, and of all else."""

    dense: int
    experts: int


@lru_cache(maxsize=4096)
def layer_parameters(model: ModelShape, letter: str, tp: int, ep: int, etp: int) -> Count:
    """Of one layer on one rank, biases and norms included."""
    found = [_part(model, part, tp, ep, etp) for part in PARTS[letter]]
    return Count(sum(count.dense for count in found), sum(count.experts for count in found))


def _part(model: ModelShape, part: Part, tp: int, ep: int, etp: int) -> Count:
    norm = model.norm_vectors * model.hidden
    if part == "attention":
        return Count(norm + _attention(model, tp), 0)
    if part == "mlp":
        return Count(norm + _mlp(model, model.inner, tp), 0)
    if part == "mamba":
        return Count(norm + _mamba(model, tp), 0)
    return _moe(model, norm, tp, ep, etp)


def _attention(model: ModelShape, tp: int) -> int:
    heads, width, h = model.num_heads // tp, model.head_width, model.hidden
    out = (heads + 2 * max(1, model.kv_heads // tp)) * width
    bias = (out if model.bias or model.qkv_bias else 0) + (h if model.bias else 0)
    norms = 2 * width if model.qk_norm else 0
    return h * out + heads * width * h + bias + norms


def _mlp(model: ModelShape, inner: int, tp: int) -> int:
    up = 2 if model.gated else 1
    bias = up * inner // tp + model.hidden if model.bias else 0
    return (up + 1) * model.hidden * inner // tp + bias


def _moe(model: ModelShape, norm: int, tp: int, ep: int, etp: int) -> Count:
    experts = model.experts
    if experts is None:
        return Count(norm, 0)
    dense = norm + model.hidden * experts.num_experts
    if experts.shared_ffn:
        dense += _mlp(model, experts.shared_ffn, tp)
    dense += model.hidden if experts.shared_gate else 0
    return Count(dense, experts.num_experts // ep * _mlp(model, experts.ffn, etp))


def _mamba(model: ModelShape, tp: int) -> int:
    mamba = model.mamba
    if mamba is None:
        return 0
    heads = mamba.num_heads // tp
    inner = heads * mamba.head_dim
    shared = 2 * max(1, mamba.num_groups // tp) * mamba.state
    # in: gate, values, B, C, steps; convolution and its bias; A, D and the steps' bias; norm; out
    projections = model.hidden * (2 * inner + shared + heads) + inner * model.hidden
    return projections + (inner + shared) * (mamba.window + 1) + 3 * heads + inner


def ends_parameters(model: ModelShape, tp: int, first: bool, last: bool) -> int:
    """Of the embedding on the first stage, the last norm and the head on the last."""
    rows = -(-model.vocabulary // tp) * model.hidden
    count = rows + model.positions * model.hidden if first else 0
    if last:
        count += model.norm_vectors * model.hidden
        count += 0 if model.tied and first else rows
    return count


def total_parameters(model: ModelShape) -> int:
    """Of the whole model."""
    layers = sum(sum(layer_parameters(model, letter, 1, 1, 1)) for letter in model.layers)
    return layers + ends_parameters(model, 1, True, True)
