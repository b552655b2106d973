import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fivefold.moe import MoEConfig, MoEForCausalLM
from fivefold.moe.cache import KVCache
from fivefold.moe.errors import MoEInputError
from fivefold.moe.generate import generate
from fivefold.moe.router_config import RouterConfig
from fivefold.parallel_core.documents import starts_of_ids

Make = Callable[..., MoEConfig]
Oracle = Callable[..., tuple[MoEForCausalLM, Any]]

SHAPES: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "one query per key": {"num_key_value_heads": 4},
    "one key": {"num_key_value_heads": 1},
    "window": {"sliding_window": 5},
    "window of one": {"sliding_window": 1},
    "one expert each": {"num_experts_per_token": 1},
    "every expert": {"num_experts_per_token": 5},
    "wide heads": {"head_dim": 12, "rope_theta": 1e4, "norm_eps": 1e-6},
    "odd widths": {"hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 1}
    | {"expert_intermediate_size": 7},
    "tied": {"tie_word_embeddings": True},
}


def ids(batch: int = 2, length: int = 13) -> Tensor:
    return torch.randint(48, (batch, length))


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_logits_of_transformers(tiny: Make, oracle: Oracle, changes: dict[str, Any]) -> None:
    ours, theirs = oracle(tiny(**changes))
    x = ids()
    with torch.no_grad():
        assert (ours(x) - theirs(x).logits).abs().max() <= 2e-5


@pytest.mark.usefixtures("exact_oracle")
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_gradients_of_transformers(tiny: Make, oracle: Oracle, changes: dict[str, Any]) -> None:
    config = tiny(**changes)
    ours, theirs = oracle(config, torch.float64)
    x = ids()
    found, wanted = ours(x), theirs(x).logits
    assert (found - wanted).abs().max() <= 1e-10
    # Not its own loss, which rounds logits to float32.
    F.cross_entropy(wanted[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
    (ours.loss(found[:, :-1], x[:, 1:]) / x[:, 1:].numel()).backward()
    right = in_our_names(theirs)
    assert right.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert (parameter.grad - right[name].view_as(parameter)).abs().max() <= 1e-10, name


def in_our_names(theirs: nn.Module) -> dict[str, Tensor]:
    """Gradients of a model in transformers' memory, where experts are fused."""
    ours = (
        ("model.", ""),
        ("input_layernorm", "input_norm"),
        ("post_attention_layernorm", "mlp_norm"),
        ("self_attn.o_proj", "attention.o_proj"),
        ("self_attn", "attention.qkv"),
        ("mlp.gate.", "mlp.router."),
        ("gate_up_proj", "gate_up"),
        ("down_proj", "down"),
    )
    gradients = {}
    for name, parameter in theirs.named_parameters():
        for old, new in ours:
            name = name.replace(old, new)
        assert parameter.grad is not None
        gradients[name] = parameter.grad
    return gradients


def test_names_of_the_parameters(tiny: Make) -> None:
    layer = [
        "input_norm.weight",
        "attention.qkv.q_proj.weight",
        "attention.qkv.k_proj.weight",
        "attention.qkv.v_proj.weight",
        "attention.o_proj.weight",
        "mlp_norm.weight",
        "mlp.router.weight",
        "mlp.experts.gate_up",
        "mlp.experts.down",
    ]
    wanted = ["embed_tokens.weight"]
    wanted += [f"layers.{i}.{name}" for i in range(2) for name in layer]
    wanted += ["norm.weight", "lm_head.weight"]
    assert [name for name, _ in MoEForCausalLM(tiny()).named_parameters()] == wanted
    assert not dict(MoEForCausalLM(tiny()).named_buffers())


def test_initial_values(tiny: Make) -> None:
    model = MoEForCausalLM(tiny(initializer_range=0.1))
    for name, parameter in model.named_parameters():
        kind, deviation = model.initialisation(name)
        if kind == "ones":
            assert name.endswith("norm.weight") and (parameter == 1).all()
        else:
            assert (kind, deviation) == ("normal", 0.1)
            assert 0.08 < parameter.std() < 0.12
    torch.manual_seed(0)
    again = MoEForCausalLM(tiny(initializer_range=0.1))
    torch.manual_seed(0)
    model = MoEForCausalLM(tiny(initializer_range=0.1))
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_a_huge_model_on_meta(tiny: Make) -> None:
    config = tiny(hidden_size=1 << 14, vocab_size=1 << 18, expert_intermediate_size=1 << 16)
    with torch.device("meta"):
        model = MoEForCausalLM(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) > 40e9
    with torch.device("meta"):
        assert model(torch.empty(2, 5, dtype=torch.int64)).shape == (2, 5, 1 << 18)


def test_meta_model_gets_the_same_values_and_output(tiny: Make) -> None:
    model, x = MoEForCausalLM(tiny(tie_word_embeddings=True)), ids()
    with torch.device("meta"):
        other = MoEForCausalLM(model.config)
    other.to_empty(device="cpu").tie_weights()
    other.load_state_dict(model.state_dict())
    assert other.lm_head is not None and other.embed_tokens is not None
    assert other.lm_head.weight is other.embed_tokens.weight
    assert torch.equal(other(x), model(x))


def test_stages_one_after_the_other_are_the_model(tiny: Make) -> None:
    whole = MoEForCausalLM(tiny(num_layers=3)).double().eval()
    x = ids()
    stages = []
    for held in (["0"], ["1", "2"]):
        stage = MoEForCausalLM(whole.config).double().eval()
        stage.load_state_dict(whole.state_dict())
        for name in list(stage.layers):
            if name not in held:
                del stage.layers[name]
        stages.append(stage)
    stages[0].norm = stages[0].lm_head = stages[1].embed_tokens = None
    assert stages[0](x).shape == (2, 13, 32)
    assert torch.equal(stages[1](stages[0](x)), whole(x))
    names = {name for stage in stages for name, _ in stage.named_parameters()}
    assert names == {name for name, _ in whole.named_parameters()}


def test_all_layers_share_one_side(tiny: Make) -> None:
    model = MoEForCausalLM(tiny(router=RouterConfig(z_loss_coef=0.1)))
    model(ids())
    assert set(model.side.drain()) == {"load.0", "load.1", "aux_loss", "z_loss"}
    model.eval()(ids())
    assert model.side.totals == {}


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("chunks", [[13], [1] * 13, [6, 1, 1, 5], [1, 12]])
def test_cache_changes_nothing(tiny: Make, chunks: list[int], window: int | None) -> None:
    model = MoEForCausalLM(tiny(sliding_window=window)).double().eval()
    x, cache = ids(), KVCache(16)
    with torch.no_grad():
        parts = [model(part, cache) for part in x.split(chunks, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(x), rtol=1e-11, atol=1e-12)
    assert cache.length == 13


def test_every_expert_has_a_gradient_although_idle(tiny: Make) -> None:
    model = MoEForCausalLM(tiny(num_experts=32, num_experts_per_token=1))
    model(ids(1, 3)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    gate_up = model.get_parameter("layers.1.mlp.experts.gate_up").grad
    assert gate_up is not None
    assert 29 <= int((gate_up.flatten(1).abs().sum(1) == 0).sum()) <= 31


def test_compiles(tiny: Make) -> None:
    model = MoEForCausalLM(tiny(num_layers=1)).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = ids()
    torch.testing.assert_close(compiled(x), model(x))


def test_weights_of_the_experts_are_drawn_once(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[int, ...]] = []
    normal = Tensor.normal_

    def count(self: Tensor, *args: Any, **options: Any) -> Tensor:
        if not self.is_meta:
            drawn.append(tuple(self.shape))
        return normal(self, *args, **options)

    monkeypatch.setattr(Tensor, "normal_", count)
    model = MoEForCausalLM(tiny(num_layers=3))
    shapes = {tuple(p.shape) for p in model.layers["0"].mlp.parameters()}
    assert len(shapes) == 3 and all(drawn.count(shape) == 3 for shape in shapes)


def test_generate_spells_out_its_options() -> None:
    """A method that drops or renames one of them would hide it from type checkers."""
    method = inspect.signature(MoEForCausalLM.generate).parameters
    function = inspect.signature(generate).parameters
    assert list(method.values())[1:] == list(function.values())[1:]


def test_generate_hands_its_options_on(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("fivefold.moe.model.generate", lambda *_, **options: seen.update(options))
    wanted: dict[str, Any] = {"do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.9}
    wanted |= {"eos_token_id": 4, "generator": torch.Generator(), "streamer": print}
    MoEForCausalLM(tiny()).generate(ids(), 2, **wanted)
    assert seen == wanted


PACKED = ([1, 5, 1, 6], [13], [4, 9])


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 3}])
def test_packed_documents_are_each_by_itself(tiny: Make, changes: dict[str, Any]) -> None:
    # The balance of experts is that of a sequence, whatever is packed into it.
    model = MoEForCausalLM(tiny(router=RouterConfig(aux_loss_coef=0.0), **changes)).double()
    x, weight = ids(3), torch.randn(3, 13, 48, dtype=torch.float64)
    numbers = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in PACKED]
    packed = model(x, document_starts=starts_of_ids(torch.stack(numbers)))
    parts = [
        torch.cat([model(p[None]) for p in x[i].split(row)], 1) for i, row in enumerate(PACKED)
    ]
    alone = torch.cat(parts)
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-13)
    found, wanted = (
        torch.autograd.grad((logits * weight).sum(), list(model.parameters()))
        for logits in (packed, alone)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


def test_packed_documents_with_a_cache_are_refused(tiny: Make) -> None:
    starts = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(MoEInputError, match="document_starts with a cache of keys and values"):
        MoEForCausalLM(tiny())(ids(1, 3), KVCache(8), document_starts=starts)
