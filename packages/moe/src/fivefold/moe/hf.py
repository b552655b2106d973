"""The names under which transformers keeps the parameters of a Mixtral model in its files."""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fivefold.moe.config import MoEConfig
from fivefold.moe.errors import MoEWeightsError

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
    "mlp.router.weight": "block_sparse_moe.gate.weight",
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
    prefix = f"model.layers.{layer}."
    if rest in _IN_LAYER:
        return [(prefix + _IN_LAYER[rest], ())]
    expert = prefix + "block_sparse_moe.experts.{}.{}.weight"
    if rest == "mlp.experts.gate_up":
        parts = ((0, "w1"), (1, "w3"))
        return [(expert.format(e, w), (e, i)) for e in range(shape[0]) for i, w in parts]
    if rest == "mlp.experts.down":
        return [(expert.format(e, "w2"), (e,)) for e in range(shape[0])]
    raise MoEWeightsError(f"a {config.model_type} model has no parameter {name!r}")


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
    if config.tie_word_embeddings:
        found = [name for name in found if name != _PLAIN["lm_head.weight"]]
    missing = sorted(set(needed) - set(found))
    extra = sorted(set(found) - set(needed))
    if missing or extra:
        raise MoEWeightsError(
            f"not the weights of this model, which has {len(set(needed))} tensors; missing: "
            f"{_listed(missing)}; not of this model: {_listed(extra)}"
        )


def parameter_shapes(config: MoEConfig) -> dict[str, tuple[int, ...]]:
    """Name and whole shape of every parameter of the model."""
    from fivefold.moe.model import MoEForCausalLM

    with torch.device("meta"):
        model = MoEForCausalLM(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _listed(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more
