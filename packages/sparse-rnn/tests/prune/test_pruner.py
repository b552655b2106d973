"""Pruning of models as they train."""

import io
from typing import Any

import pytest
import torch
from torch import nn

from fivefold.sparse_rnn import SparseGRU, SparseLSTM, SparseRNNInputError
from fivefold.sparse_rnn.prune import (
    Balanced,
    Blocks,
    Cubic,
    GradualPruner,
    Narang,
    NofM,
    OneShot,
    RigL,
    Unstructured,
    export,
)
from fivefold.sparse_rnn.prune.regrowth import regrow


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.encoder = nn.LSTM(6, 32, 2, bidirectional=True)
        self.decoder = nn.GRU(64, 32)
        self.head = nn.Linear(32, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        y, _ = self.encoder(self.embedding(tokens))
        return self.head(self.decoder(y)[0])


def _train(model: nn.Module, pruner: GradualPruner, steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(steps):
        tokens = torch.randint(11, (5, 4))
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), (tokens % 3).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step()


@pytest.mark.parametrize("scope", ["global", "matrix", "gate"])
def test_zeros_come_gradually_and_stay(scope: Any) -> None:
    model = _Model()
    pruner = GradualPruner(model, Cubic(density=0.1, start=2, end=10, every=4), scope=scope)
    names = set(pruner.masks)
    assert "encoder.weight_hh_l1_reverse" in names and "decoder.weight_hh_l0" in names
    assert not any("weight_ih" in name for name in names)
    _train(model, pruner, 3)
    assert pruner.density == 1.0
    before = {name: mask.clone() for name, mask in pruner.masks.items()}
    _train(model, pruner, 6)
    middle = pruner.density
    assert 0.1 < middle < 1.0
    _train(model, pruner, 6)
    assert pruner.density == pytest.approx(0.1, abs=0.002)
    for name, mask in pruner.masks.items():
        weight = model.get_parameter(name)
        assert torch.equal(weight != 0, mask) and not bool((mask & ~before[name]).any())
        if scope == "gate":
            gates = 3 if name.startswith("decoder") else 4
            shares = [float(part.float().mean()) for part in mask.chunk(gates)]
            assert max(shares) - min(shares) < 0.002
    if scope == "global":
        assert len({int(mask.sum()) for mask in pruner.masks.values()}) > 2


def test_pruned_weights_get_no_gradient() -> None:
    model = nn.LSTM(4, 16)
    pruner = GradualPruner(model, OneShot(density=0.25))
    pruner.step()
    model(torch.randn(3, 2, 4))[0].sum().backward()
    mask = pruner.masks["weight_hh_l0"]
    assert not model.weight_hh_l0.grad[~mask].any() and model.weight_hh_l0.grad[mask].all()
    pruner.remove()
    model.zero_grad()
    model(torch.randn(3, 2, 4))[0].sum().backward()
    assert model.weight_hh_l0.grad[~mask].any()


def test_a_threshold_drops_what_is_below() -> None:
    model = nn.GRU(4, 16)
    before = model.weight_hh_l0.detach().clone()
    pruner = GradualPruner(model, Narang(magnitude=0.2, start=0, ramp=1, end=2, every=1))
    for _ in range(3):
        pruner.step()
    assert torch.equal(model.weight_hh_l0 != 0, before.abs() > 0.2)


def test_inputs_may_be_pruned_too() -> None:
    model = nn.LSTM(10, 16)
    kinds = ("weight_hh", "weight_ih")
    pruner = GradualPruner(model, OneShot(density=0.5), kinds=kinds)
    pruner.step()
    assert set(pruner.masks) == {"weight_hh_l0", "weight_ih_l0"}
    assert float((model.weight_ih_l0 != 0).float().mean()) == 0.5


@pytest.mark.parametrize("pattern", [Unstructured(), Balanced(bank=16)])
def test_regrowth_keeps_the_number_and_changes_places(pattern: Any) -> None:
    model = _Model()
    pruner = GradualPruner(
        model,
        OneShot(density=0.25),
        pattern=pattern,
        regrowth=RigL(start=2, end=12, every=2, fraction=0.5),
    )
    _train(model, pruner, 2)
    before = {name: mask.clone() for name, mask in pruner.masks.items()}
    _train(model, pruner, 8)
    for name, mask in pruner.masks.items():
        assert int(mask.sum()) == int(before[name].sum())
        assert bool((mask & ~before[name]).any())
        if isinstance(pattern, Balanced):
            assert bool((mask.view(mask.shape[0], -1, 16).sum(-1) == 4).all())
    _train(model, pruner, 4)
    frozen = {name: mask.clone() for name, mask in pruner.masks.items()}
    _train(model, pruner, 3)
    assert all(torch.equal(mask, frozen[name]) for name, mask in pruner.masks.items())


def test_regrow_drops_the_smallest_and_grows_the_steepest() -> None:
    weight = torch.tensor([[5.0, 1.0, 4.0, 0.0, 0.0, 0.0]])
    gradient = torch.tensor([[0.0, 99.0, 0.0, 1.0, 3.0, 2.0]])
    mask = weight != 0
    found = regrow(weight, gradient, mask, 1 / 3, Unstructured())
    assert found.tolist() == [[True, False, True, False, True, False]]


def test_another_pruner_goes_on() -> None:
    model = _Model()
    schedule = Cubic(density=0.1, start=0, end=10, every=5)
    pruner = GradualPruner(model, schedule)
    _train(model, pruner, 6)
    other = GradualPruner(model, schedule)
    other.load_state_dict(pruner.state_dict())
    assert other.steps == 6 and other.density == pruner.density
    with pytest.raises(SparseRNNInputError, match="this model has"):
        GradualPruner(nn.LSTM(3, 4), schedule).load_state_dict(pruner.state_dict())


def test_export_replaces_pruned_layers_and_computes_the_same() -> None:
    model = _Model()
    pruner = GradualPruner(model, OneShot(density=0.1))
    pruner.step()
    sparse = export(model)
    assert isinstance(sparse.encoder, SparseLSTM) and isinstance(sparse.decoder, SparseGRU)
    assert isinstance(model.encoder, nn.LSTM)
    tokens = torch.randint(11, (5, 4))
    torch.testing.assert_close(sparse(tokens), model(tokens))
    assert sparse.decoder.density == pytest.approx(0.1, abs=0.001)


def test_export_prunes_on_request_and_takes_a_bare_layer() -> None:
    layer = export(nn.RNN(3, 20), density=0.2)
    assert layer.density == pytest.approx(0.2)
    with pytest.raises(SparseRNNInputError, match=r"at most 50% nonzeros:.* has 100\.0%"):
        export(_Model())
    with pytest.raises(SparseRNNInputError, match="there is no"):
        export(nn.Linear(2, 2))


def test_mistakes_are_told() -> None:
    with pytest.raises(SparseRNNInputError, match="holds no torch"):
        GradualPruner(nn.Linear(2, 2), OneShot(density=0.1))
    with pytest.raises(SparseRNNInputError, match="scope is 'layer'; legal: global"):
        GradualPruner(nn.LSTM(2, 2), OneShot(density=0.1), scope="layer")  # type: ignore[arg-type]
    with pytest.raises(SparseRNNInputError, match="legal: weight_hh, weight_ih"):
        GradualPruner(nn.LSTM(2, 2), OneShot(density=0.1), kinds=("bias",))
    with pytest.raises(SparseRNNInputError, match="start must be below end"):
        RigL(start=5, end=5)


PATTERNS = {
    "unstructured": Unstructured(),
    "balanced": Balanced(bank=16),
    "blocks": Blocks(rows=16),
    "2:4": NofM(n=2, m=4),
}


def _fits(name: str, mask: torch.Tensor) -> bool:
    """Whether a mask has the pattern's form, whatever its density."""
    if name == "balanced":
        return mask.view(mask.shape[0], -1, 16).sum(-1).unique().numel() == 1
    if name == "2:4":
        return int(mask.view(mask.shape[0], -1, 4).sum(-1).max()) <= 2
    if name == "blocks":
        blocks = mask.view(-1, 16, mask.shape[1])
        return torch.equal(blocks.all(1), blocks.any(1))
    return True


@pytest.mark.parametrize("scope", ["global", "matrix", "gate"])
@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_holds_after_every_step(name: str, scope: Any) -> None:
    model = _Model()
    schedule = Cubic(density=0.5, start=0, end=4, every=2)
    regrowth = RigL(start=5, end=9, every=1, fraction=0.4)
    pruner = GradualPruner(model, schedule, pattern=PATTERNS[name], scope=scope, regrowth=regrowth)
    changed = 0
    for step in range(10):
        before = {key: mask.clone() for key, mask in pruner.masks.items()}
        _train(model, pruner, 1)
        for key, mask in pruner.masks.items():
            assert not model.get_parameter(key)[~mask].any()
            if step >= 4:
                assert _fits(name, mask)
            if step >= 5:
                assert int(mask.sum()) == int(before[key].sum())
                changed += int((mask & ~before[key]).sum())
    assert changed > 0
    assert pruner.density == pytest.approx(0.5, abs=0.01)


def test_weights_in_use_stay_where_nothing_else_has_a_gradient() -> None:
    weight, mask = torch.tensor([[3.0, 2.0, 0.0, 0.0]]), torch.tensor([[True, True, False, False]])
    for pattern in (Unstructured(), NofM(n=2, m=4)):
        kept = regrow(weight, torch.zeros(1, 4), mask, 0.5, pattern)
        assert torch.equal(kept, mask)
        moved = regrow(weight, torch.tensor([[9.0, 9.0, 0.0, 1e30]]), mask, 0.5, pattern)
        assert moved.tolist() == [[True, False, False, True]]
        lost = regrow(weight, torch.full((1, 4), torch.nan), mask, 0.5, pattern)
        assert torch.equal(lost, mask)


def test_blocks_at_an_edge_do_not_multiply() -> None:
    weight, pattern = torch.rand(37, 6) + 0.1, Blocks(rows=16)
    (mask,) = pattern.select([weight], 0.5)
    for _ in range(5):
        mask = regrow(weight, torch.rand(37, 6), mask, 0.3, pattern)
        assert pattern.density_of(mask) == 0.5


def test_a_run_that_was_stopped_goes_on_bit_for_bit() -> None:
    def make() -> tuple[_Model, GradualPruner, torch.optim.Optimizer]:
        torch.manual_seed(1)
        model = _Model()
        pruner = GradualPruner(
            model,
            Cubic(density=0.2, start=1, end=5, every=2),
            regrowth=RigL(start=6, end=12, every=2),
        )
        return model, pruner, torch.optim.Adam(model.parameters(), 0.01)

    def run(made: tuple[Any, ...], steps: range) -> None:
        model, pruner, optimizer = made
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            tokens = torch.randint(11, (5, 4), generator=generator)
            optimizer.zero_grad()
            model(tokens).square().mean().backward()
            optimizer.step()
            pruner.step()

    whole, first, second = make(), make(), make()
    run(whole, range(10))
    run(first, range(7))
    buffer = io.BytesIO()
    torch.save([each.state_dict() for each in first], buffer)
    buffer.seek(0)
    for each, state in zip(second, torch.load(buffer), strict=True):
        each.load_state_dict(state)
    run(second, range(7, 10))
    for (name, one), other in zip(whole[0].named_parameters(), second[0].parameters(), strict=True):
        assert torch.equal(one, other), name
    assert all(torch.equal(whole[1].masks[name], mask) for name, mask in second[1].masks.items())


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_are_pruned_too(cell: Any) -> None:
    model = nn.ModuleDict({"cell": cell(4, 16), "rnn": nn.GRU(4, 16)})
    pruner = GradualPruner(model, OneShot(density=0.25), scope="gate")
    pruner.step()
    weight = model["cell"].weight_hh
    gates = weight.shape[0] // 16
    assert [int((part != 0).sum()) for part in weight.chunk(gates)] == [64] * gates
    made = export(model)
    assert type(made["cell"]) is cell and torch.equal(made["cell"].weight_hh, weight)
    assert isinstance(made["rnn"], SparseGRU)


def test_shared_weights_have_one_mask_and_shared_layers_stay_shared() -> None:
    model = nn.ModuleDict({"a": nn.LSTM(4, 16), "b": nn.LSTM(4, 16)})
    model["b"].weight_hh_l0 = model["a"].weight_hh_l0
    pruner = GradualPruner(model, OneShot(density=0.25))
    assert list(pruner.masks) == ["a.weight_hh_l0"]
    twice = nn.ModuleDict({"a": nn.LSTM(4, 16)})
    twice["b"] = twice["a"]
    made = export(twice, density=0.25)
    assert isinstance(made["a"], SparseLSTM) and made["a"] is made["b"]


def test_export_keeps_places_of_masks_whose_weights_are_zero() -> None:
    model = nn.ModuleDict({"rnn": nn.LSTM(4, 16)})
    pruner = GradualPruner(model, OneShot(density=0.25))
    pruner.step()
    with torch.no_grad():
        model["rnn"].weight_hh_l0[pruner.masks["rnn.weight_hh_l0"]] = 0.0
    made = export(model, masks=pruner.masks)
    assert torch.equal(made["rnn"].mask("weight_hh_l0"), pruner.masks["rnn.weight_hh_l0"])
    assert export(model["rnn"]).density == 0.0
