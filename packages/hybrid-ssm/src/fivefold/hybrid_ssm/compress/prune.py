"""From a parent's layers to a smaller model's: which parts stay, and what is cut from each.

Legend: F neurons, H hidden width, K channels of heads.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fivefold.hybrid_ssm.compress.importance import Scores
from fivefold.hybrid_ssm.compress.stream import Stream, make_layer
from fivefold.hybrid_ssm.config import HybridConfig
from fivefold.hybrid_ssm.errors import HybridConfigError
from fivefold.hybrid_ssm.model import Layer
from fivefold.hybrid_ssm.pattern import ATTENTION, EXPERTS, LETTERS, MAMBA, MLP
from fivefold.parallel_core.config import Config, replace


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate(Config):
    """A smaller model as a part of its parent.

    Attributes:
        layers: indices of the parent's layers that stay, ascending.
        width: inner width of all feed-forward layers.
        experts: routed experts of all expert layers; 0 where there are none.
        mamba_heads: heads of all Mamba-2 layers; 0 where there are none.
    """

    layers: tuple[int, ...]
    width: int
    experts: int
    mamba_heads: int

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise HybridConfigError(
                f"layers is {self.layers}; a candidate keeps at least one, in ascending order"
            )


def whole(parent: HybridConfig) -> Candidate:
    """The candidate that is the parent."""
    return Candidate(
        layers=tuple(range(parent.num_layers)),
        width=parent.intermediate_size,
        experts=parent.num_experts,
        mamba_heads=parent.num_mamba_heads,
    )


def pruned_config(parent: HybridConfig, candidate: Candidate) -> HybridConfig:
    """Configuration of the smaller model: a plain one, without the parent's prediction depths.

    Raises:
        HybridConfigError: there cannot be such a model.
    """
    return replace(
        parent,
        pattern="".join(parent.pattern[index] for index in candidate.layers),
        intermediate_size=candidate.width,
        num_experts=candidate.experts,
        num_mamba_heads=candidate.mamba_heads,
        num_nextn_predict_layers=0,
    )


def removal_order(parent: HybridConfig, layers: Tensor, letter: str) -> list[int]:
    """Layers of a kind, the least important first; of equal ones the later first."""
    of_kind = [index for index, each in enumerate(parent.pattern) if each == letter]
    return sorted(of_kind, key=lambda index: (float(layers[index]), -index))


def best_layers(parent: HybridConfig, layers: Tensor, counts: Mapping[str, int]) -> tuple[int, ...]:
    """The most important layers of each kind, so many of it, in the parent's order."""
    kept: list[int] = []
    for letter in LETTERS:
        order = removal_order(parent, layers, letter)
        kept += order[len(order) - counts.get(letter, 0) :]
    return tuple(sorted(kept))


def best(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` highest scores, ascending; of equal ones the first."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:count].sort().values


def best_in_groups(scores: Tensor, count: int, num_groups: int) -> Tensor:
    """The same with equally many of each of consecutive groups.

    Raises:
        HybridConfigError: the count is no multiple of the groups.
    """
    if count % num_groups:
        raise HybridConfigError(
            f"{count} cannot be shared by {num_groups} groups, which keep equally many; choose a "
            f"multiple of {num_groups}"
        )
    of_group = len(scores) // num_groups
    kept = [
        best(part, count // num_groups) + group * of_group
        for group, part in enumerate(scores.view(num_groups, of_group))
    ]
    return torch.cat(kept)


def pruned_state(
    layer: Layer, index: int, parent: HybridConfig, candidate: Candidate, scores: Scores
) -> dict[str, Tensor]:
    """The parameters of a parent's layer that stay, by their names in the layer."""
    state = dict(layer.state_dict())
    kind = parent.pattern[index]
    if kind == MLP and candidate.width < parent.intermediate_size:
        rows = best(scores.neurons[index], candidate.width)
        _cut(state, rows, dim0=("up_proj.weight", "up_proj.bias"), dim1=("down_proj.weight",))
    elif kind == EXPERTS and candidate.experts < parent.num_experts:
        groups = parent.num_expert_groups
        rows = best_in_groups(scores.experts[index], candidate.experts, groups)
        names = ("router.weight", "router.bias", "experts.up", "experts.down")
        _cut(state, rows, dim0=names)
    elif kind == MAMBA and candidate.mamba_heads < parent.num_mamba_heads:
        if index not in scores.heads:
            raise HybridConfigError(
                f"{candidate.mamba_heads} of {parent.num_mamba_heads} Mamba-2 heads were asked for "
                "and heads were not scored; set importance.mamba_heads=true"
            )
        rows = best_in_groups(scores.heads[index], candidate.mamba_heads, parent.num_groups)
        _cut_heads(state, rows, parent.mamba_head_dim)
    return state


def _cut(
    state: dict[str, Tensor], rows: Tensor, dim0: tuple[str, ...], dim1: tuple[str, ...] = ()
) -> None:
    for names, dim in ((dim0, 0), (dim1, 1)):
        for name in (f"mixer.{each}" for each in names):
            if name in state:
                state[name] = state[name].index_select(dim, rows.to(state[name].device))


def _cut_heads(state: dict[str, Tensor], heads: Tensor, head_dim: int) -> None:
    """Heads of a Mamba-2 layer; its groups keep their B and C."""
    channels = (heads.unsqueeze(1) * head_dim + torch.arange(head_dim)).flatten()
    names = ("in_proj.z", "in_proj.x", "heads.conv_x")
    wide = tuple(f"{name}.{what}" for name in names for what in ("weight", "bias"))
    _cut(state, channels, dim0=(*wide, "norm.weight"), dim1=("out_proj.weight",))
    each = ("in_proj.dt.weight", "in_proj.dt.bias", "heads.A_log", "heads.D", "heads.dt_bias")
    _cut(state, heads, dim0=each)


def pruned_layers(stream: Stream, candidate: Candidate, scores: Scores) -> Iterator[Layer]:
    """The layers of the smaller model, one at a time."""
    config = pruned_config(stream.config, candidate)
    for place, index in enumerate(candidate.layers):
        state = pruned_state(stream.layer(index), index, stream.config, candidate, scores)
        yield make_layer(config, place, state)


def random_scores(parent: HybridConfig, seed: int) -> Scores:
    """Scores that choose at random: what importance has to beat."""
    generator = torch.Generator().manual_seed(seed)

    def draw(letter: str, size: int) -> dict[int, Tensor]:
        of_kind = [index for index, each in enumerate(parent.pattern) if each == letter]
        return {
            index: torch.rand(size, generator=generator, dtype=torch.float64) for index in of_kind
        }

    layers = torch.rand(parent.num_layers, generator=generator, dtype=torch.float64)
    return Scores(
        layers,
        draw(MLP, parent.intermediate_size),
        draw(MAMBA, parent.num_mamba_heads),
        draw(EXPERTS, parent.num_experts),
    )


def counts_of(parent: HybridConfig, candidate: Candidate) -> dict[str, int]:
    """How many layers of each kind stay."""
    kept = [parent.pattern[index] for index in candidate.layers]
    return {letter: kept.count(letter) for letter in (ATTENTION, MAMBA, MLP, EXPERTS)}
