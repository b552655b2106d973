"""Split layers and split cross entropy against torch's own, on tp of 2 and of 4 ranks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fivefold.parallel_core.collectives import piece_along, sum_over
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.ledger import CommLedger
from fivefold.parallel_core.linear_group import LinearGroup
from fivefold.parallel_core.losses import CrossEntropy
from fivefold.parallel_core.parameters import ParameterTable
from fivefold.parallel_core.styles import ColumnParallel, RowParallel, Style, VocabParallel
from fivefold.parallel_core.tensor_parallel import (
    ColumnParallelLinears,
    RowParallelLinear,
    VocabParallelCrossEntropy,
    VocabParallelEmbedding,
)
from fivefold.parallel_core.topology import Axis, Topology

B, S, H = 2, 8, 12
TP_SIZES = (2, 4)
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
# The largest relative error that rounding explains: the losses are taken in float32 or wider, and
# the gradient of bfloat16 logits is rounded once to its 8 bits.
ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-8}

# ---- layers --------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerCase:
    """A layer, the style that splits it, and whether it reads ids, features, or a part of them."""

    name: str
    make: Callable[[], nn.Module]
    style: Callable[[bool], Style]
    reads: str


def group(bias: bool) -> nn.Module:
    return LinearGroup({name: nn.Linear(H, 8, bias=bias) for name in ("a", "b", "c")})


def in_eights(sequence: bool) -> Style:
    return VocabParallel(sequence, multiple=8)


LAYERS = [
    LayerCase("column", lambda: nn.Linear(H, 8), ColumnParallel, "features"),
    LayerCase("column group", lambda: group(True), ColumnParallel, "features"),
    LayerCase("column group without bias", lambda: group(False), ColumnParallel, "features"),
    LayerCase("row", lambda: nn.Linear(8, H), RowParallel, "part"),
    LayerCase("row without bias", lambda: nn.Linear(8, H, bias=False), RowParallel, "part"),
    LayerCase("embedding of 37", lambda: nn.Embedding(37, H), VocabParallel, "ids"),
    LayerCase("head of 37", lambda: nn.Linear(H, 37), VocabParallel, "features"),
    LayerCase("head in eights", lambda: nn.Linear(H, 37), in_eights, "features"),
]


def whole_layer(case: LayerCase) -> nn.Module:
    torch.manual_seed(0)
    return case.make().double()


def whole_input(case: LayerCase) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if case.reads == "ids":
        return torch.randint(0, 37, (B, S), generator=generator)
    width = H if case.reads == "features" else 8
    return torch.randn(B, S, width, generator=generator, dtype=torch.float64)


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def ramp(y: Tensor) -> Tensor:
    """Weights that differ everywhere."""
    return torch.arange(y.numel(), dtype=y.dtype).view_as(y).cos()


def weighted(outputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """A loss with the gradient ``weights``."""
    return torch.stack([(y * w).sum() for y, w in zip(outputs, weights, strict=True)]).sum()


@dataclass
class LayerErrors:
    """Largest distances from the whole layer, and what was sent."""

    output: float
    input_gradient: float
    parameter_gradients: dict[str, float]
    sent: dict[tuple[str, str], int]


def distance(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        raise AssertionError(f"{a.shape} is not {b.shape}")
    return (a - b).abs().max().item() if a.numel() else 0.0


def layer_errors(case: LayerCase, sequence: bool, topology: Topology) -> LayerErrors:
    axis = topology.axis("tp")
    whole, x = whole_layer(case), leaf(case, whole_input(case))
    outputs = as_tuple(whole(x))
    weights = [ramp(y) for y in outputs]
    weighted(outputs, weights).backward()

    table, model = ParameterTable(topology), nn.Module()
    model.layer = case.style(sequence).apply(whole_layer(case), "layer", table)
    local_x = leaf(case, input_part(case, sequence, x, axis))
    with CommLedger(topology) as ledger:
        local_outputs = as_tuple(model.layer(local_x))
        shapes = [y.shape for y in local_outputs]
        local_weights = [
            output_part(case, sequence, w, axis, shape)
            for w, shape in zip(weights, shapes, strict=True)
        ]
        weighted(local_outputs, local_weights).backward()
    wanted = [
        output_part(case, sequence, y, axis, shape)
        for y, shape in zip(outputs, shapes, strict=True)
    ]
    return LayerErrors(
        output=max(distance(y, w) for y, w in zip(local_outputs, wanted, strict=True)),
        input_gradient=0.0
        if x.grad is None or local_x.grad is None
        else distance(local_x.grad, input_part(case, sequence, x.grad, axis)),
        parameter_gradients=parameter_errors(model, whole, table, axis),
        sent={key: entry.calls for key, entry in ledger.entries.items()},
    )


def leaf(case: LayerCase, x: Tensor) -> Tensor:
    """A copy to take the gradient of, unless it holds ids."""
    return x.detach().clone().requires_grad_(case.reads != "ids")


def input_part(case: LayerCase, sequence: bool, x: Tensor, axis: Axis) -> Tensor:
    """What this rank reads."""
    if case.reads == "part":
        return piece_along(x, axis, 2)
    return piece_along(x, axis, 1) if sequence and case.reads == "features" else x


def output_part(
    case: LayerCase, sequence: bool, y: Tensor, axis: Axis, shape: torch.Size
) -> Tensor:
    """What this rank gives; where features are padded, the padding is zero."""
    if case.reads == "features":
        missing = shape[-1] * axis.size - y.shape[-1]
        return piece_along(F.pad(y, (0, missing)), axis, 2)
    return piece_along(y, axis, 1) if sequence else y


def parameter_errors(
    model: nn.Module, whole: nn.Module, table: ParameterTable, axis: Axis
) -> dict[str, float]:
    gradients = {name: p.grad for name, p in whole.named_parameters()}
    errors = {}
    for piece in table.pieces(model):
        assert piece.grad is not None
        grad = sum_over(piece.grad, axis) if piece.placement.partial else piece.grad
        padding = grad.abs().sum() - piece.trim(grad).abs().sum()
        wanted = gradients[piece.name.removeprefix("layer.")]
        assert wanted is not None
        error = distance(piece.trim(grad), wanted[piece.box.slices])
        errors[piece.name] = max(error, padding.item())
    return errors


# ---- cross entropy -------------------------------------------------------------------------


@dataclass(frozen=True)
class LossCase:
    """Logits of ``rows`` tokens over ``vocab_size`` ids."""

    vocab_size: int
    dtype: torch.dtype = torch.float64
    smoothing: float = 0.0
    ignore_index: int = -100
    kind: str = "plain"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.kind} {self.vocab_size} {dtype} ε={self.smoothing} ({self.ignore_index})"

    def data(self) -> tuple[Tensor, Tensor]:
        """Logits (2, 5, V) and targets (2, 5)."""
        generator = torch.Generator().manual_seed(2)
        logits = torch.randn(2, 5, self.vocab_size, generator=generator, dtype=torch.float64) * 3
        targets = torch.randint(0, self.vocab_size, (2, 5), generator=generator)
        targets[0, 1:3] = self.ignore_index
        if self.kind == "all ignored":
            targets[:] = self.ignore_index
        if self.kind == "huge":
            logits *= 1e30
        if self.kind == "masked":
            others = F.one_hot(targets.clamp(min=0), self.vocab_size) == 0
            logits[others & (torch.arange(self.vocab_size) % 3 == 0)] = -torch.inf
        return logits.to(self.dtype), targets


LOSSES = [
    *(
        LossCase(vocab_size, dtype, smoothing, ignore_index)
        for vocab_size, dtype, smoothing, ignore_index in product(
            (37, 5), DTYPES, (0.0, 0.1), (-100, 3)
        )
    ),
    *(LossCase(37, dtype, 0.1, -100, "all ignored") for dtype in DTYPES),
    *(LossCase(37, dtype, 0.0, -100, "huge") for dtype in DTYPES),
    *(LossCase(37, dtype, 0.0, -100, "masked") for dtype in DTYPES),
    LossCase(37, torch.float64, 0.1, -100, "huge"),
]


@dataclass
class LossErrors:
    """Relative distances, and the dtype of the loss and of the gradient."""

    loss: float
    gradient: float
    dtypes: tuple[torch.dtype, torch.dtype]


def loss_errors(case: LossCase, axis: Axis, weight: float = 0.25) -> LossErrors:
    logits, targets = case.data()
    leaf = logits.clone().requires_grad_()
    wide = leaf.to(torch.promote_types(case.dtype, torch.float32))
    wanted = F.cross_entropy(
        wide.flatten(0, 1),
        targets.flatten(),
        ignore_index=case.ignore_index,
        label_smoothing=case.smoothing,
        reduction="sum",
    )
    (wanted * weight).backward()
    assert leaf.grad is not None

    width = -(-case.vocab_size // axis.size)
    # Nobody wrote the padding, so it may hold anything.
    padded = F.pad(logits, (0, width * axis.size - case.vocab_size), value=torch.nan)
    mine = piece_along(padded, axis, 2).clone().requires_grad_()
    plain = CrossEntropy(case.ignore_index, case.smoothing)
    loss = VocabParallelCrossEntropy.of(plain, axis, case.vocab_size)(mine, targets)
    (loss * weight).backward()
    assert mine.grad is not None
    true = max(min(case.vocab_size - axis.rank * width, width), 0)
    grad = leaf.grad[..., axis.rank * width : axis.rank * width + true]
    scale = leaf.grad.abs().max().item() or 1.0
    padding = mine.grad[..., true:].abs().sum().item()
    return LossErrors(
        loss=abs(loss.item() - wanted.item()) / (abs(wanted.item()) or 1.0),
        gradient=max(distance(mine.grad[..., :true], grad) / scale, padding),
        dtypes=(loss.dtype, mine.grad.dtype),
    )


# ---- what is kept for backward -------------------------------------------------------------


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of every distinct storage that autograd keeps, without the parameters'."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}
    alive = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def kept(style: Style, layer: nn.Module, shape: tuple[int, ...], topology: Topology) -> int:
    """Bytes that a layer keeps of an input of ``shape``."""
    parallel = style.apply(layer.double(), "layer", ParameterTable(topology))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    with saved_bytes(parallel) as found:
        parallel(x)
    return sum(found.values())


def kept_by_layers(topology: Topology) -> dict[str, int]:
    tp = topology.size("tp")
    part, row = (B, S // tp, H), nn.Linear(8, H)
    return {
        "column": kept(ColumnParallel(), nn.Linear(H, 8), part, topology),
        "column group": kept(ColumnParallel(), group(True), part, topology),
        "column whole": kept(ColumnParallel(False), group(True), (B, S, H), topology),
        "row": kept(RowParallel(), row, (B, S, 8 // tp), topology),
    }


# ---- the job -------------------------------------------------------------------------------


@dataclass
class Found:
    """One rank's results for one tp size."""

    layers: dict[tuple[int, bool], LayerErrors]
    losses: list[LossErrors]
    kept: dict[str, int]


def on_a_rank() -> dict[int, Found]:
    found = {}
    for tp in TP_SIZES:
        topology = Topology(Layout(4, tp=tp))
        found[tp] = Found(
            layers={
                (i, sequence): layer_errors(case, sequence, topology)
                for i, case in enumerate(LAYERS)
                for sequence in (True, False)
            },
            losses=[loss_errors(case, topology.axis("tp")) for case in LOSSES],
            kept=kept_by_layers(topology),
        )
    return found


@pytest.fixture(scope="module")
def job() -> list[dict[int, Found]]:
    return launch(on_a_rank, 4, timeout=300)


@pytest.mark.parametrize("tp", TP_SIZES)
@pytest.mark.parametrize("sequence", [True, False], ids=["sequence", "whole"])
@pytest.mark.parametrize("index", range(len(LAYERS)), ids=[case.name for case in LAYERS])
def test_a_split_layer_equals_the_whole_one(
    job: list[dict[int, Found]], tp: int, sequence: bool, index: int
) -> None:
    for found in job:
        errors = found[tp].layers[index, sequence]
        assert errors.output < 1e-13
        assert errors.input_gradient < 1e-13
        assert errors.parameter_gradients
        assert max(errors.parameter_gradients.values()) < 1e-12, errors.parameter_gradients


SENT = {
    ("column", True): {"all_gather": 2, "reduce_scatter": 1},
    ("column group", True): {"all_gather": 2, "reduce_scatter": 1},
    ("row", True): {"reduce_scatter": 1, "all_gather": 1},
    ("embedding of 37", True): {"reduce_scatter": 1, "all_gather": 1},
    ("column", False): {"all_reduce": 1},
    ("column group", False): {"all_reduce": 1},
    ("row", False): {"all_reduce": 1},
    ("embedding of 37", False): {"all_reduce": 1},
}


@pytest.mark.parametrize(("name", "sequence"), SENT)
def test_a_layer_sends_what_the_paper_counts(
    job: list[dict[int, Found]], name: str, sequence: bool
) -> None:
    """Forward and backward; a sequence-sharded input is gathered once for all linears, twice."""
    index = [case.name for case in LAYERS].index(name)
    wanted = {(collective, "tp"): calls for collective, calls in SENT[name, sequence].items()}
    assert job[0][4].layers[index, sequence].sent == wanted


@pytest.mark.parametrize("tp", TP_SIZES)
@pytest.mark.parametrize("index", range(len(LOSSES)), ids=map(str, LOSSES))
def test_split_cross_entropy_equals_torchs(
    job: list[dict[int, Found]], tp: int, index: int
) -> None:
    case = LOSSES[index]
    for found in job:
        errors = found[tp].losses[index]
        wide = torch.promote_types(case.dtype, torch.float32)
        assert errors.dtypes == (wide, case.dtype)
        assert errors.loss <= ROUNDING[wide]
        assert errors.gradient <= ROUNDING[case.dtype]


@pytest.mark.parametrize("tp", TP_SIZES)
def test_only_the_rank_s_own_part_is_kept_for_backward(
    job: list[dict[int, Found]], tp: int
) -> None:
    for found in job:
        part = B * (S // tp) * H * 8
        assert found[tp].kept == {
            "column": part,
            "column group": part,  # the shared input once
            "column whole": B * S * H * 8,
            "row": B * S * (8 // tp) * 8,
        }


# ---- one rank ------------------------------------------------------------------------------


@pytest.mark.parametrize("sequence", [True, False])
def test_one_rank_is_torch_bit_for_bit(sequence: bool) -> None:
    axis = Topology.local().axis("tp")
    x, ids = torch.randn(B, S, H), torch.randint(0, 37, (B, S))
    linear, embedding = nn.Linear(H, H), nn.Embedding(37, H)
    column = ColumnParallelLinears.of(linear, axis, sequence)
    row = RowParallelLinear.of(linear, axis, sequence)
    split = VocabParallelEmbedding(embedding.weight, axis, sequence)
    assert torch.equal(column(x), linear(x))
    torch.testing.assert_close(row(x), linear(x))
    assert torch.equal(split(ids), embedding(ids))


def test_one_rank_leaves_padding_out_of_the_loss() -> None:
    logits, targets = torch.randn(3, 8), torch.tensor([0, 1, 4])
    loss = VocabParallelCrossEntropy.of(CrossEntropy(), Topology.local().axis("tp"), 5)
    assert torch.equal(loss(logits, targets), CrossEntropy()(logits[:, :5], targets))


def test_the_parallel_loss_keeps_the_options_of_the_plain_one() -> None:
    plain = CrossEntropy(ignore_index=3, label_smoothing=0.2)
    loss = VocabParallelCrossEntropy.of(plain, Topology.local().axis("tp"), 5)
    assert (loss.ignore_index, loss.label_smoothing, loss.vocab_size) == (3, 0.2, 5)


def test_a_group_with_some_biases_is_refused() -> None:
    axis = Axis("tp", 2, 0, (0, 1))
    mixed = LinearGroup({"a": nn.Linear(H, 8), "b": nn.Linear(H, 8, bias=False)})
    with pytest.raises(ValueError, match="all have a bias, or none"):
        ColumnParallelLinears.of(mixed, axis, True)(torch.randn(B, S, H))


# ---- how layers multiply -------------------------------------------------------------------


class Counted(nn.Linear):
    """A linear that has a way of its own to multiply."""

    calls = 0

    @staticmethod
    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        Counted.calls += 1
        return F.linear(x, weight, bias)


@pytest.mark.parametrize(
    ("make", "kind", "calls"),
    [
        (lambda: Counted(H, 8), ColumnParallelLinears, 1),
        (lambda: LinearGroup({"a": Counted(H, 8), "b": Counted(H, 4)}), ColumnParallelLinears, 2),
        (lambda: Counted(H, 8, bias=False), RowParallelLinear, 1),
    ],
    ids=["column", "group", "row"],
)
def test_layers_multiply_as_the_linears_that_they_were(
    make: Callable[[], nn.Module],
    kind: type[ColumnParallelLinears] | type[RowParallelLinear],
    calls: int,
) -> None:
    layer, x = make(), torch.randn(B, S, H)
    expected = as_tuple(layer(x))
    split = kind.of(layer, Topology.local().axis("tp"), sequence=False)
    before = Counted.calls
    for found, wanted in zip(as_tuple(split(x)), expected, strict=True):
        assert torch.equal(found, wanted)
    assert Counted.calls == before + calls
