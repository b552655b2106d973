from collections.abc import Callable

import pytest
import torch

from fivefold.moe import MoEConfig, MoEForCausalLM
from fivefold.moe.errors import MoEWeightsError
from fivefold.moe.hf import check_names, from_hf, hf_sources, parameter_shapes, to_hf
from fivefold.parallel_core.errors import CheckpointError


def test_sources_of_every_kind_of_parameter(tiny: Callable[..., MoEConfig]) -> None:
    config, moe = tiny(), "model.layers.1.block_sparse_moe."
    assert hf_sources(config, "norm.weight", (32,)) == [("model.norm.weight", ())]
    assert hf_sources(config, "layers.1.mlp.router.weight", (2, 32)) == [(moe + "gate.weight", ())]
    assert hf_sources(config, "layers.1.mlp.experts.gate_up", (2, 2, 24, 32)) == [
        (moe + "experts.0.w1.weight", (0, 0)),
        (moe + "experts.0.w3.weight", (0, 1)),
        (moe + "experts.1.w1.weight", (1, 0)),
        (moe + "experts.1.w3.weight", (1, 1)),
    ]
    assert hf_sources(config, "layers.1.mlp.experts.down", (2, 32, 24)) == [
        (moe + "experts.0.w2.weight", (0,)),
        (moe + "experts.1.w2.weight", (1,)),
    ]


@pytest.mark.parametrize("name", ["layers.0.mlp.gate.weight", "norm", "layers.x.norm.weight"])
def test_unknown_parameter(tiny: Callable[..., MoEConfig], name: str) -> None:
    with pytest.raises(MoEWeightsError, match=f"no parameter '{name}'"):
        hf_sources(tiny(), name, (3,))


@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_bitwise(tiny: Callable[..., MoEConfig], tied: bool) -> None:
    config = tiny(tie_word_embeddings=tied)
    state = dict(MoEForCausalLM(config).named_parameters())
    theirs = to_hf(config, state)
    assert ("lm_head.weight" in theirs) != tied
    back = from_hf(config, theirs)
    assert back.keys() == state.keys() == parameter_shapes(config).keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert sum(t.numel() for t in theirs.values()) == sum(t.numel() for t in state.values())


def test_tensors_that_do_not_fit(tiny: Callable[..., MoEConfig]) -> None:
    config = tiny()
    theirs = to_hf(config, MoEForCausalLM(config).state_dict())
    gate = "model.layers.0.block_sparse_moe.gate.weight"
    with pytest.raises(MoEWeightsError, match=rf"missing: {gate}; .* of this model: extra\.bias"):
        check_names(config, [name for name in theirs if name != gate] + ["extra.bias"])
    with pytest.raises(CheckpointError, match="40 more; not of this model: none"):
        check_names(config, ["model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"])
    with pytest.raises(MoEWeightsError, match=r"has shape \(4, 32\), the model needs \(5, 32\)"):
        from_hf(config, theirs | {gate: theirs[gate][:4]})
    check_names(config, [*theirs, "model.layers.0.self_attn.rotary_emb.inv_freq"])
