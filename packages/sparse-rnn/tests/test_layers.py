"""SparseRNN, SparseLSTM and SparseGRU against torch's own layers with the zeros in place."""

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from fivefold.sparse_rnn import SparseGRU, SparseLSTM, SparseRNN, SparseRNNInputError

CELLS: dict[str, tuple[type[nn.Module], type[nn.RNNBase], dict[str, Any]]] = {
    "lstm": (SparseLSTM, nn.LSTM, {}),
    "gru": (SparseGRU, nn.GRU, {}),
    "tanh": (SparseRNN, nn.RNN, {}),
    "relu": (SparseRNN, nn.RNN, {"nonlinearity": "relu"}),
}
PATTERNS = (
    "none",
    "one",
    "1 %",
    "10 %",
    "30 %",
    "all",
    "empty rows",
    "empty gate",
    "row",
    "column",
)
HIDDEN = (1, 7, 31, 33, 96, 257)
BATCHES = (1, 2, 3, 5, 8, 17)


def _mask(name: str, rows: int, hidden: int) -> Tensor:
    mask = torch.zeros(rows, hidden, dtype=torch.bool)
    if name.endswith("%"):
        mask = torch.rand(rows, hidden) < float(name.removesuffix("%")) / 100
    elif name == "one":
        mask[rows // 2, hidden // 2] = True
    elif name == "all":
        mask[:] = True
    elif name == "empty rows":
        mask[::3] = torch.rand(mask[::3].shape) < 0.4
    elif name == "empty gate":
        mask[hidden:] = torch.rand(rows - hidden, hidden) < 0.4
    elif name == "row":
        mask[rows - 1] = True
    elif name == "column":
        mask[:, 0] = True
    return mask


def _twins(
    cell: str, hidden: int, pattern: str, dtype: torch.dtype, **options: Any
) -> tuple[nn.Module, nn.RNNBase]:
    sparse_class, dense_class, more = CELLS[cell]
    dense = dense_class(5, hidden, **options, **more).to(dtype)
    with torch.no_grad():
        for name, weight in dense.named_parameters():
            if name.startswith("weight_hh"):
                # Alive for long: a state neither dies out nor grows without end.
                mask = _mask(pattern, *weight.shape)
                weight.copy_(torch.randn_like(weight) * mask)
                weight /= (mask.sum(1, keepdim=True) + 1).sqrt() * 1.5
    return sparse_class.from_dense(dense), dense


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, PackedSequence):
        yield found.data
    else:
        for each in found:
            yield from _tensors(each)


def _run(layer: nn.Module, inputs: list[Any], loss_seed: int = 3) -> tuple[list[Tensor], list[Any]]:
    """Outputs, and gradients of inputs and parameters by name."""
    leaves = [x.detach().clone().requires_grad_() for x in _tensors(inputs)]
    again = iter(leaves)
    outputs = list(_tensors(layer(*_rebuild(inputs, again))))
    generator = torch.Generator().manual_seed(loss_seed)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in outputs]
    loss = sum((x * w.to(x.dtype)).sum() for x, w in zip(outputs, weights, strict=True))
    named = dict(layer.named_parameters())
    gradients = torch.autograd.grad(loss, [*leaves, *named.values()], allow_unused=True)
    names = [*(f"input {i}" for i in range(len(leaves))), *named]
    return outputs, list(zip(names, gradients, strict=True))


def _rebuild(inputs: Any, leaves: Iterator[Tensor]) -> list[Any]:
    if isinstance(inputs, PackedSequence):
        return inputs._replace(data=next(leaves))
    if isinstance(inputs, Tensor):
        return next(leaves)
    return type(inputs)(_rebuild(each, leaves) for each in inputs)


def _assert_same(sparse: nn.Module, dense: nn.Module, inputs: list[Any], tolerance: float) -> None:
    (found, gradients), (expected, dense_gradients) = _run(sparse, inputs), _run(dense, inputs)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        _assert_near("output", one, other, tolerance)
    for (name, one), (other_name, other) in zip(gradients, dense_gradients, strict=True):
        assert name == other_name
        if name.startswith("weight_hh"):
            other = other[sparse.mask(name)]
        _assert_near(name, one, other, tolerance)


def _assert_near(name: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    found, expected = found.detach(), expected.detach()
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    error = float((found - expected).abs().max()) if expected.numel() else 0.0
    assert error <= tolerance * max(1.0, scale), f"{name} is off by {error} of {scale}"


def _inputs(cell: str, steps: int, batch: int, hidden: int, dtype: torch.dtype) -> list[Any]:
    x, h, c = (
        torch.randn(steps, batch, 5),
        torch.randn(1, batch, hidden),
        torch.randn(1, batch, hidden),
    )
    x, h, c = x.to(dtype), h.to(dtype), c.to(dtype)
    return [x, (h, c)] if cell == "lstm" else [x, h]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("cell", CELLS)
def test_equals_dense_in_float64(cell: str, pattern: str) -> None:
    for hidden in HIDDEN:
        for batch in BATCHES:
            sparse, dense = _twins(cell, hidden, pattern, torch.float64)
            inputs = _inputs(cell, 3, batch, hidden, torch.float64)
            _assert_same(sparse, dense, inputs, 1e-10)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("cell", CELLS)
def test_equals_dense_in_float32(cell: str, pattern: str) -> None:
    for hidden in HIDDEN:
        for batch in BATCHES:
            sparse, dense = _twins(cell, hidden, pattern, torch.float32)
            inputs = _inputs(cell, 3, batch, hidden, torch.float32)
            _assert_same(sparse, dense, inputs, 1e-5)


@pytest.mark.parametrize("pattern", ["1 %", "30 %", "row", "empty gate"])
@pytest.mark.parametrize("cell", CELLS)
def test_equals_dense_at_a_thousand_units(cell: str, pattern: str) -> None:
    for batch, dtype, tolerance in ((1, torch.float32, 1e-5), (5, torch.float64, 1e-10)):
        sparse, dense = _twins(cell, 1000, pattern, dtype)
        _assert_same(sparse, dense, _inputs(cell, 2, batch, 1000, dtype), tolerance)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("cell", CELLS)
def test_equals_dense_over_333_steps(cell: str, pattern: str) -> None:
    # Over all cells and patterns every size meets every number of sequences.
    kind = list(CELLS).index(cell)
    first = kind + PATTERNS.index(pattern)
    for i in range(3):
        hidden, batch = HIDDEN[(first + 2 * i) % 6], BATCHES[(first + 3 * kind + i) % 6]
        sparse, dense = _twins(cell, hidden, pattern, torch.float32)
        _assert_same(sparse, dense, _inputs(cell, 333, batch, hidden, torch.float32), 1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_equals_dense_over_333_steps_in_float64(cell: str) -> None:
    for batch in (1, 3, 8):
        sparse, dense = _twins(cell, 96, "10 %", torch.float64)
        _assert_same(sparse, dense, _inputs(cell, 333, batch, 96, torch.float64), 1e-10)


@pytest.mark.parametrize(
    ("cell", "pattern", "batch"),
    [("lstm", "10 %", 1), ("gru", "30 %", 2), ("tanh", "one", 3), ("relu", "column", 1)],
)
def test_equals_dense_at_a_thousand_units_over_333_steps(
    cell: str, pattern: str, batch: int
) -> None:
    sparse, dense = _twins(cell, 1000, pattern, torch.float32)
    _assert_same(sparse, dense, _inputs(cell, 333, batch, 1000, torch.float32), 1e-5)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_threads_share_the_units_and_give_the_same_bits(cell: str, threads: int) -> None:
    sparse, dense = _twins(cell, 257, "10 %", torch.float32)
    inputs = _inputs(cell, 20, 3, 257, torch.float32)
    torch.set_num_threads(threads)
    _assert_same(sparse, dense, inputs, 1e-5)
    (first, gradients), (second, again) = _run(sparse, inputs), _run(sparse, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(gradients, again, strict=True))


OPTIONS: list[dict[str, Any]] = [
    {"num_layers": 3},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"bias": False, "batch_first": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("form", ["batch", "unbatched", "packed", "packed sorted", "packed equal"])
def test_every_form_of_call(cell: str, options: dict[str, Any], form: str) -> None:
    sparse, dense = _twins(cell, 19, "30 %", torch.float64, **options)
    x = torch.randn(7, 5) if form == "unbatched" else torch.randn(4, 7, 5)
    first = options.get("batch_first", False)
    if form.startswith("packed"):
        lengths = {"packed": [3, 7, 1, 5], "packed sorted": [7, 5, 2, 2]}.get(form, [7, 7, 7, 7])
        packed = x if first else x.transpose(0, 1)
        call: Any = pack_padded_sequence(
            packed.double(), torch.tensor(lengths), first, enforce_sorted=form != "packed"
        )
    else:
        call = x.double() if first or form == "unbatched" else x.transpose(0, 1).double()
    shape = (options.get("num_layers", 1) * (1 + options.get("bidirectional", False)), 4, 19)
    state = torch.randn(2, *shape, dtype=torch.float64)
    if form == "unbatched":
        state = state[:, :, 0]
    hx: Any = (state[0], state[1]) if cell == "lstm" else state[0]
    _assert_same(sparse, dense, [call, hx], 1e-10)
    _assert_same(sparse, dense, [call], 1e-10)


def test_a_packed_output_looks_as_torch_has_it() -> None:
    sparse, dense = _twins("lstm", 9, "30 %", torch.float64)
    packed = pack_padded_sequence(
        torch.randn(6, 3, 5).double(), torch.tensor([2, 6, 4]), enforce_sorted=False
    )
    (found, _), (expected, _) = sparse(packed), dense(packed)
    assert isinstance(found, PackedSequence)
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert torch.equal(one, other)


def test_dropout_is_between_layers_and_in_training_only() -> None:
    layer = SparseGRU(5, 16, 2, dropout=1.0, density=0.5)
    x = torch.randn(4, 2, 5)
    y, _ = layer(x)
    bare = SparseGRU(16, 16, density=0.5)
    bare.load_state_dict(
        {k.replace("l1", "l0"): v for k, v in layer.state_dict().items() if "l1" in k}
    )
    torch.testing.assert_close(y, bare(torch.zeros(4, 2, 16))[0])
    layer.eval()
    assert not torch.allclose(layer(x)[0], y)


@pytest.mark.parametrize("change", ["no_grad", "data", "optimizer", "load"])
def test_weights_changed_in_place_are_noticed(change: str) -> None:
    layer = SparseLSTM(5, 40, density=0.2)
    x = torch.randn(6, 1, 5)
    before = layer(x)[0].detach()
    weight = layer.weight_hh_l0
    if change == "no_grad":
        with torch.no_grad():
            weight.mul_(-2)
    elif change == "data":
        weight.data[3] += 1.0  # no version of the parameter tells
    elif change == "optimizer":
        layer(x)[0].sum().backward()
        torch.optim.SGD(layer.parameters(), 0.1).step()
    else:
        layer.load_state_dict(SparseLSTM(5, 40, density=0.2).state_dict())
    after = layer(x)[0]
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, layer.to_dense()(x)[0])


def test_gradients_are_of_the_nonzeros_alone() -> None:
    layer = SparseLSTM(5, 30, density=0.1)
    layer(torch.randn(3, 2, 5))[0].sum().backward()
    assert layer.weight_hh_l0.shape == layer.weight_hh_l0.grad.shape == (360,)
    optimizer = torch.optim.AdamW(layer.parameters(), weight_decay=0.1)
    optimizer.step()
    assert optimizer.state[layer.weight_hh_l0]["exp_avg"].shape == (360,)
    assert layer.density == pytest.approx(0.1)
    assert int((layer.dense_weight("weight_hh_l0") != 0).sum()) == 360


def test_state_dicts_go_both_ways() -> None:
    sparse = SparseGRU(4, 12, 2, bidirectional=True, density=0.3)
    dense = nn.GRU(4, 12, 2, bidirectional=True)
    assert list(sparse.state_dict()) == list(dense.state_dict())
    dense.load_state_dict(sparse.state_dict())
    other = SparseGRU(4, 12, 2, bidirectional=True, density=1.0)
    other.load_state_dict(dense.state_dict())
    x = torch.randn(5, 3, 4)
    torch.testing.assert_close(other(x), dense(x))
    assert other.density == 1.0  # its pattern holds what was loaded
    fresh = SparseGRU(4, 12, 2, bidirectional=True, density=0.05)
    fresh.load_state_dict(dense.state_dict())
    assert fresh.density == pytest.approx(sparse.density)


def test_a_kept_weight_that_is_zero_keeps_its_place() -> None:
    layer = SparseRNN(4, 12, density=0.5)
    with torch.no_grad():
        layer.weight_hh_l0[5] = 0.0
    held = layer.state_dict()
    assert "weight_hh_l0_mask" in held
    other = SparseRNN(4, 12, density=0.1)
    other.load_state_dict(held)
    assert torch.equal(other.mask("weight_hh_l0"), layer.mask("weight_hh_l0"))


def test_a_wrong_shape_is_told_by_load_state_dict() -> None:
    with pytest.raises(RuntimeError, match=r"weight_hh_l0 has shape \(20, 20\), not \(10, 10\)"):
        SparseRNN(4, 10, density=0.5).load_state_dict(nn.RNN(4, 20).state_dict())


@pytest.mark.parametrize("cell", CELLS)
def test_masks_of_torch_prune_are_followed(cell: str) -> None:
    sparse_class, dense_class, options = CELLS[cell]
    dense = dense_class(5, 24, **options)
    for name in ("weight_hh_l0", "weight_ih_l0"):
        prune.l1_unstructured(dense, name, 0.7)
    held = dense.state_dict()
    assert "weight_hh_l0_orig" in held
    layer = sparse_class.from_dense(dense)
    assert layer.density == pytest.approx(0.3, abs=0.001)
    x = torch.randn(4, 2, 5)
    torch.testing.assert_close(layer(x), dense(x))
    other = sparse_class(5, 24, density=0.01, **options)
    other.load_state_dict(held)
    torch.testing.assert_close(other(x), dense(x))
    for each in (layer, other):  # the zeros of the input's weights stay
        each(x)[0].sum().backward()
        kept = dense.weight_ih_l0_mask.bool()
        assert not each.weight_ih_l0.grad[~kept].any() and each.weight_ih_l0.grad[kept].any()


def test_parametrisations_are_followed() -> None:
    class Halve(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * (torch.arange(weight.shape[1]) % 2)

    dense = nn.LSTM(5, 24)
    parametrize.register_parametrization(dense, "weight_hh_l0", Halve())
    layer = SparseLSTM.from_dense(dense)
    assert layer.density == 0.5
    x = torch.randn(4, 2, 5)
    torch.testing.assert_close(layer(x), dense(x))


def test_density_keeps_the_largest() -> None:
    dense = nn.LSTM(5, 24)
    layer = SparseLSTM.from_dense(dense, 0.25)
    size, mask = dense.weight_hh_l0.abs(), layer.mask("weight_hh_l0")
    assert int(mask.sum()) == 24 * 24
    assert float(size[mask].min()) >= float(size[~mask].max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_float32(dtype: torch.dtype) -> None:
    layer = SparseGRU(5, 70, density=0.2).to(dtype)
    x = torch.randn(9, 3, 5, dtype=dtype)
    y, h = layer(x)
    assert y.dtype == h.dtype == dtype
    wide = copy.deepcopy(layer).double()
    expected = wide(x.double())[0]
    assert float((y - expected).detach().abs().max()) < 4 * torch.finfo(dtype).eps


def test_copies_and_pickles() -> None:
    layer = SparseLSTM(5, 20, density=0.3)
    x = torch.randn(3, 2, 5)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x)[0], layer(x)[0])
        with torch.no_grad():
            other.weight_hh_l0.zero_()
        assert not torch.equal(other(x)[0], layer(x)[0])


def test_gradcheck() -> None:
    layer = SparseLSTM(2, 6, density=0.4, dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    h, c = torch.randn(2, 1, 2, 6, dtype=torch.float64).unbind()
    run: Callable[..., Any] = lambda x, h, c, *_: layer(x, (h, c))[0]  # noqa: E731
    assert torch.autograd.gradcheck(
        run, (x, h.requires_grad_(), c.requires_grad_(), *layer.parameters())
    )


def test_compiles_whole() -> None:
    layer = SparseGRU(5, 20, 2, density=0.3)
    x = torch.randn(3, 2, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparseLSTM(4, 8, proj_size=2, density=0.1), "proj_size is 2"),
        (lambda: SparseLSTM(4, 0, density=0.1), "hidden_size is 0; it must be at least 1"),
        (lambda: SparseLSTM(4, 8, density=1.5), "density was asked to be 1.5"),
        (lambda: SparseRNN(4, 8, nonlinearity="sin", density=0.1), "nonlinearity is 'sin'"),
        (lambda: SparseGRU(4, 8, dropout=2.0, density=0.1), "dropout is 2.0"),
        (lambda: SparseGRU.from_dense(nn.LSTM(4, 8)), "made from torch.nn.GRU, found LSTM"),
        (lambda: SparseLSTM.from_dense(nn.LSTM(4, 8, proj_size=2)), "proj_size is 2"),
        (lambda: SparseGRU(4, 8, density=0.1)(torch.randn(3, 2, 5)), "this layer takes 4"),
        (lambda: SparseGRU(4, 8, density=0.1)(torch.randn(0, 2, 4)), "has no steps"),
        (lambda: SparseGRU(4, 8, density=0.1)(torch.randn(4)), "it must have 2 dims"),
        (
            lambda: SparseGRU(4, 8, density=0.1)(torch.randn(3, 2, 4), torch.randn(1, 3, 8)),
            r"h_0 has shape \(1, 3, 8\) instead of \(1, 2, 8\)",
        ),
    ],
)
def test_mistakes_are_told(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(SparseRNNInputError, match=message):
        make()
