"""How much layers, neurons, heads and experts matter, by forward passes (section 3 of the paper).

A layer's score is the mean squared error, before the output layer, that leaving it out causes. All
removals run beside the whole model in one pass over the layers, so weights are read once a pass:
the run without layer i starts, when layer i is reached, from what the whole model gave it.

Legend: B sequences, S tokens, H hidden width, F neurons, K experts of a token, N tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fivefold.hybrid_ssm.compress.config import Aggregate, ImportanceConfig
from fivefold.hybrid_ssm.compress.stream import Stream
from fivefold.hybrid_ssm.config import HybridConfig
from fivefold.hybrid_ssm.memory import Context
from fivefold.hybrid_ssm.model import Layer
from fivefold.hybrid_ssm.pattern import EXPERTS, MAMBA, MLP

LAYERS, NEURONS, HEADS, LOADS = "layers", "neurons", "heads", "experts"


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of a model's parts; more is more important.

    Attributes:
        layers: (L,) mean squared error without the layer.
        neurons: (F,) of each feed-forward layer, by its index.
        heads: (heads,) of each Mamba-2 layer; empty where they were not asked for.
        experts: (E,) of each expert layer: mean weight that the router gives an expert.
    """

    layers: Tensor
    neurons: dict[int, Tensor]
    heads: dict[int, Tensor]
    experts: dict[int, Tensor]


@dataclass(slots=True)
class Sums:
    """What has been added up over the passes so far.

    Attributes:
        values: by name: "layers", or kind and layer such as "neurons.3"; float64.
        layer_samples: sequences in "layers".
        neuron_samples: sequences in the others.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    layer_samples: int = 0
    neuron_samples: int = 0

    def add(self, name: str, value: Tensor) -> None:
        """Add a vector."""
        value = value.detach().double().cpu()
        self.values[name] = self.values[name] + value if name in self.values else value

    def scores(self, config: ImportanceConfig) -> Scores:
        """The scores that the sums stand for."""
        parts: dict[str, dict[int, Tensor]] = {NEURONS: {}, HEADS: {}, LOADS: {}}
        for name, total in self.values.items():
            kind, _, layer = name.partition(".")
            if kind == LOADS:
                parts[kind][int(layer)] = total / max(self.neuron_samples, 1)
            elif kind != LAYERS:
                done = _finish(total, config.over_batch, self.neuron_samples)
                parts[kind][int(layer)] = done
        layers = self.values[LAYERS] / max(self.layer_samples, 1)
        return Scores(layers, parts[NEURONS], parts[HEADS], parts[LOADS])


def over_sequence(x_bsf: Tensor, how: Aggregate) -> Tensor:
    """Magnitudes (B, S, F) to one number for each sequence (B, F): their mean, or L2 norm."""
    x_bsf = x_bsf.double()
    return x_bsf.abs().mean(1) if how == "mean" else x_bsf.norm(dim=1)


def over_batch(x_bf: Tensor, how: Aggregate) -> Tensor:
    """What of a batch (B, F) is added up: values for a mean, squares for an L2 norm."""
    return x_bf.sum(0) if how == "mean" else x_bf.square().sum(0)


def _finish(total: Tensor, how: Aggregate, samples: int) -> Tensor:
    return total / max(samples, 1) if how == "mean" else total.sqrt()


@torch.no_grad()
def score_pass(
    stream: Stream,
    ids_bs: Tensor,
    context: Context,
    sums: Sums,
    config: ImportanceConfig,
    *,
    layers: bool,
    neurons: bool,
) -> None:
    """Run one batch through the model and add to the sums.

    Args:
        stream: the model.
        ids_bs: sequences (B, S).
        context: their documents.
        sums: what is added to.
        config: how.
        layers: whether layers are scored, which costs about L/2 times as much.
        neurons: whether the others are.
    """
    whole = stream.embed(ids_bs)
    without: list[Tensor] = []
    for index in range(stream.config.num_layers):
        layer, before = stream.layer(index), whole
        with _watched(layer, stream.config, index, sums, config, neurons):
            whole = layer(before, context)
        without = [layer(x_bsh, context) for x_bsh in without]
        if layers:
            without.append(before)
    if layers:
        tail = stream.tail()
        expected = tail.hidden(whole).double()
        errors = [(tail.hidden(x).double() - expected).square().mean() for x in without]
        sums.add(LAYERS, torch.stack(errors) * len(ids_bs))
        sums.layer_samples += len(ids_bs)
    if neurons:
        sums.neuron_samples += len(ids_bs)


@contextmanager
def _watched(
    layer: Layer,
    model: HybridConfig,
    index: int,
    sums: Sums,
    config: ImportanceConfig,
    active: bool,
) -> Iterator[None]:
    """Add to the sums what flows inside a layer."""
    kind, mixer = model.pattern[index], layer.get_submodule("mixer")
    handle = None
    if active and kind == MLP:
        handle = mixer.get_submodule("down_proj").register_forward_pre_hook(
            _watch(lambda args: args[0], f"{NEURONS}.{index}", sums, config)
        )
    elif active and kind == MAMBA and config.mamba_heads:
        handle = mixer.get_submodule("in_proj").register_forward_hook(
            _watch_heads(model, f"{HEADS}.{index}", sums, config)
        )
    elif active and kind == EXPERTS:
        handle = mixer.get_submodule("router").register_forward_hook(
            _watch_experts(model.num_experts, f"{LOADS}.{index}", sums)
        )
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def _watch(
    take: Callable[[Any], Tensor], name: str, sums: Sums, config: ImportanceConfig
) -> Callable[[nn.Module, Any], None]:
    def hook(_: nn.Module, args: Any) -> None:
        values_bf = over_sequence(take(args), config.over_sequence)
        sums.add(name, over_batch(values_bf, config.over_batch))

    return hook


def _watch_heads(
    model: HybridConfig, name: str, sums: Sums, config: ImportanceConfig
) -> Callable[[nn.Module, Any, Any], None]:
    """A head counts by the size of the x that goes into it, as in Model-Optimizer."""

    def hook(_: nn.Module, args: Any, out: Any) -> None:
        x_bsk = out[1]
        size_bsh = x_bsk.unflatten(-1, (model.num_mamba_heads, -1)).double().norm(dim=-1)
        values_bf = over_sequence(size_bsh, config.over_sequence)
        sums.add(name, over_batch(values_bf, config.over_batch))

    return hook


def _watch_experts(
    num_experts: int, name: str, sums: Sums
) -> Callable[[nn.Module, Any, Any], None]:
    """An expert counts by the weight that it gets from the router, on average over tokens."""

    def hook(_: nn.Module, args: Any, out: Any) -> None:
        weights_nk, experts_nk = out
        total_e = weights_nk.new_zeros(num_experts, dtype=torch.float64)
        total_e.index_add_(0, experts_nk.flatten().long(), weights_nk.flatten().double())
        sums.add(name, total_e / args[0].shape[1])

    return hook


def save_sums(sums: Sums, path: Path) -> None:
    """Keep the sums between passes, all or nothing."""
    from safetensors.torch import save

    from fivefold.parallel_core.files import atomic_write_bytes

    counts = torch.tensor([sums.layer_samples, sums.neuron_samples])
    atomic_write_bytes(path, save({"counts": counts, **sums.values}))


def load_sums(path: Path) -> Sums:
    """The sums so far; empty where there are none."""
    from safetensors.torch import load

    if not path.exists():
        return Sums()
    values = load(path.read_bytes())
    layer_samples, neuron_samples = values.pop("counts").tolist()
    return Sums(values, layer_samples, neuron_samples)
