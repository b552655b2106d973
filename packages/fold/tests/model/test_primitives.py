"""Dropout, recomputation and what a network begins with."""

import copy
from dataclasses import replace

import torch
from fold_network import tiny_config
from torch import Tensor

from fivefold.fold import AlphaFold, LossConfig, alphafold_loss
from fivefold.fold.model.alphafold import Previous
from fivefold.fold.model.primitives import SharedDropout
from fivefold.parallel_core.regions import recompute


def test_dropout_is_shared_along_its_dim() -> None:
    torch.manual_seed(0)
    x = torch.ones(2, 50, 60, 8)
    rows, columns = SharedDropout(0.25, -3), SharedDropout(0.25, -2)
    dropped = rows(x)
    assert torch.equal(dropped, dropped[:, :1].expand_as(x))
    assert not torch.equal(dropped, dropped[:, :, :1].expand_as(x))
    assert torch.allclose(dropped.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert abs(float((dropped == 0).float().mean()) - 0.25) < 0.05
    dropped = columns(x)
    assert torch.equal(dropped, dropped[:, :, :1].expand_as(x))
    assert torch.equal(rows.eval()(x), x)


def test_recomputed_blocks_are_bitwise_the_same(features: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    config = tiny_config()
    stack = {"msa_dropout": 0.2, "pair_dropout": 0.3}
    config = replace(config, evoformer=replace(config.evoformer, **stack))
    kept = AlphaFold(config).train()
    with torch.no_grad():
        for parameter in kept.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    names = [name for name, _ in kept.named_parameters()]
    found = []
    for regions in ("none", "full", "selective"):
        model = copy.deepcopy(kept)
        recompute(model, regions)
        assert [name for name, _ in model.named_parameters()] == names
        torch.manual_seed(1)
        loss, _ = alphafold_loss(model(features, num_recycles=1), features, LossConfig())
        loss.backward()
        found.append((loss.detach(), [p.grad for p in model.parameters()]))
    for loss, gradients in found[1:]:
        assert torch.equal(loss, found[0][0])
        for one, other in zip(gradients, found[0][1], strict=True):
            assert (one is None and other is None) or torch.equal(one, other)


def test_a_new_network_adds_nothing_yet(features: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    model = AlphaFold(tiny_config()).eval()
    z = torch.randn(16, 16, 8)
    block = model.evoformer.blocks["0"]
    for layer, arguments in (
        (block.pair.triangle_multiplication_outgoing, (z, torch.ones(16, 16))),
        (block.pair.triangle_attention_starting, (z, None)),
        (block.pair.pair_transition, (z,)),
    ):
        assert torch.equal(layer(*arguments), torch.zeros_like(z))
    attention = block.msa_row_attention.attention
    assert torch.equal(attention.gate_bias, torch.ones_like(attention.gate_bias))
    gates = attention.linear_qkvg.weight[3 * 8 :]
    assert torch.equal(gates, torch.zeros_like(gates))
    assert bool((attention.linear_qkvg.weight[:8] != 0).any())
    with torch.no_grad():
        outputs = model(features)
    quaternion = outputs["structure_module"]["final_affines"][:, :4]
    assert torch.allclose(quaternion, torch.tensor([1.0, 0, 0, 0]).expand_as(quaternion))


def test_recycling_stops_gradients_and_features_may_change(features: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    model = AlphaFold(tiny_config()).eval()
    other = features | {"msa_feat": torch.rand_like(features["msa_feat"])}
    by_hand = model.iteration(other, _previous(model, features))
    both = model([features, other])
    assert torch.equal(both["representations"]["pair"], by_hand["representations"]["pair"])
    assert both["representations"]["pair"].requires_grad
    assert not torch.equal(both["representations"]["pair"], model(other)["representations"]["pair"])


def _previous(model: AlphaFold, features: dict[str, Tensor]) -> Previous:
    with torch.no_grad():
        return Previous.of(model.iteration(features))
