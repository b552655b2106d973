"""The names under which transformers keeps the parameters of a model in its files."""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fivefold.moe.config import MoEConfig
from fivefold.moe.errors import MoEWeightsError
from fivefold.moe.families import FAMILIES

# Ours to theirs, of a whole parameter.
_PLAIN = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_IN_LAYER = {
    "input_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "attention.qkv.q_proj.weight": "self_attn.q_proj.weight",
    "attention.qkv.k_proj.weight": "self_attn.k_proj.weight",
    "attention.qkv.v_proj.weight": "self_attn.v_proj.weight",
    "attention.o_proj.weight": "self_attn.o_proj.weight",
    **{f"attention.qkv.{x}_proj.bias": f"self_attn.{x}_proj.bias" for x in "qkv"},
    **{f"attention.{x}_norm.weight": f"self_attn.{x}_norm.weight" for x in "qk"},
}
# Of the network that all tokens share: in a dense layer's ``mlp``, and in ``mlp.shared``.
_GATED = {
    "gate_up.gate_proj.weight": "gate_proj.weight",
    "gate_up.up_proj.weight": "up_proj.weight",
    "down.weight": "down_proj.weight",
}
# Some older files carry it; it follows from the configuration.
_COMPUTED = "rotary_emb.inv_freq"
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


def hf_sources(
    config: MoEConfig, name: str, shape: tuple[int, ...]
) -> list[tuple[str, tuple[int, ...]]]:
    """Where a parameter comes from in transformers' files.

    Args:
        config: the model's configuration.
        name: global name of our parameter.
        shape: its whole shape.

    Returns:
        Pairs ``(their name, index)``: their tensor is our ``parameter[index]``.

    Raises:
        MoEWeightsError: the model has no parameter of this name.
    """
    if config.tie_word_embeddings and name == "lm_head.weight":
        name = "embed_tokens.weight"
    if name in _PLAIN:
        return [(_PLAIN[name], ())]
    match = _LAYER.fullmatch(name)
    layer, rest = match.groups() if match else ("", "")
    found = _in_layer(config, rest, shape)
    if not found:
        raise MoEWeightsError(f"a {config.model_type} model has no parameter {name!r}")
    return [(f"model.layers.{layer}.{source}", index) for source, index in found]


def _in_layer(
    config: MoEConfig, name: str, shape: tuple[int, ...]
) -> list[tuple[str, tuple[int, ...]]]:
    """The same below the name of a layer; nothing for a name that no layer has."""
    family = FAMILIES[config.model_type]
    names = _IN_LAYER | {
        "mlp.router.weight": f"{family.block}.gate.weight",
        "mlp.router.bias": f"{family.block}.gate.e_score_correction_bias",
        "mlp.shared_gate.weight": f"{family.block}.shared_expert_gate.weight",
        **{f"mlp.{ours}": f"mlp.{theirs}" for ours, theirs in _GATED.items()},
        **{
            f"mlp.shared.{ours}": f"{family.block}.{family.shared}.{theirs}"
            for ours, theirs in _GATED.items()
        },
    }
    if name in names:
        return [(names[name], ())]
    expert = family.block + ".experts.{}.{}.weight"
    gate, up, down = family.experts
    if name == "mlp.experts.gate_up":
        parts = ((0, gate), (1, up))
        return [(expert.format(e, w), (e, i)) for e in range(shape[0]) for i, w in parts]
    if name == "mlp.experts.down":
        return [(expert.format(e, down), (e,)) for e in range(shape[0])]
    return []


def to_hf(config: MoEConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters by our names to transformers' tensors by their names, sharing memory."""
    return {
        source: tensor[index]
        for name, tensor in state.items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
        for source, index in hf_sources(config, name, tuple(tensor.shape))
    }


def from_hf(config: MoEConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Transformers' tensors by their names to our parameters by our names, as new tensors.

    Raises:
        MoEWeightsError: a tensor is missing, too many, or of another shape.
    """
    ours = {}
    check_names(config, state)
    for name, shape in parameter_shapes(config).items():
        sources = hf_sources(config, name, shape)
        ours[name] = state[sources[0][0]].new_empty(shape)
        for source, index in sources:
            if state[source].shape != shape[len(index) :]:
                raise MoEWeightsError(
                    f"{source!r} has shape {tuple(state[source].shape)}, the model needs "
                    f"{shape[len(index) :]}"
                )
            ours[name][index] = state[source]
    return ours


def check_names(config: MoEConfig, names: Iterable[str]) -> None:
    """Check that tensors of these names are the weights of a model, no more and no less.

    Raises:
        MoEWeightsError: lists what is missing and what does not belong to the model.
    """
    shapes = parameter_shapes(config)
    needed = [source for name in shapes for source, _ in hf_sources(config, name, shapes[name])]
    found = [name for name in names if not name.endswith(_COMPUTED)]
    if FAMILIES[config.model_type].predicts_ahead:
        found = [name for name in found if _layer_of(name) < config.num_layers]
    if config.tie_word_embeddings:
        found = [name for name in found if name != _PLAIN["lm_head.weight"]]
    missing = sorted(set(needed) - set(found))
    extra = sorted(set(found) - set(needed))
    if missing or extra:
        raise MoEWeightsError(
            f"not the weights of this model, which has {len(set(needed))} tensors; missing: "
            f"{_listed(missing)}; not of this model: {_listed(extra)}"
        )


def _layer_of(name: str) -> int:
    """Index of the layer that a tensor of theirs belongs to; -1 for none."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else -1


def parameter_shapes(config: MoEConfig) -> dict[str, tuple[int, ...]]:
    """Name and whole shape of all that a model's files hold: parameters, and routers' biases."""
    from fivefold.moe.model import MoEForCausalLM

    with torch.device("meta"):
        model = MoEForCausalLM(config)
    return {name: tuple(tensor.shape) for name, tensor in saved_tensors(model).items()}


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a model's files hold: its parameters, and its routers' biases."""
    biases = {name: b for name, b in model.named_buffers() if name.endswith(".router.bias")}
    return {**dict(model.named_parameters()), **biases}


def _listed(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more
