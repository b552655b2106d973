"""The table of parameters: pieces tile every parameter, and initialisation knows no layout."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from fivefold.parallel_core import parameters
from fivefold.parallel_core.box import Box
from fivefold.parallel_core.build import build
from fivefold.parallel_core.data_parallel import Precision
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.parameters import ParameterTable, Piece, Placement, initialise
from fivefold.parallel_core.plan import parallelize
from fivefold.parallel_core.topology import Topology

from .imagined import imagined
from .toy import HEAD, TAIL, Toy, ToyConfig, plan, resized, rule

CONFIG = ToyConfig(num_experts=4)
SEED = 11


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds change every few rows, also inside what one rank holds."""
    monkeypatch.setattr(parameters, "_BLOCK", 40)


def whole_values(config: ToyConfig, seed: int = SEED) -> dict[str, Tensor]:
    """Every parameter of the whole toy after initialisation."""
    model = Toy(config)
    initialise(ParameterTable.of(model).pieces(model), rule, seed)
    return {name: p.detach() for name, p in model.named_parameters()}


# ---- the table -----------------------------------------------------------------------------


def test_a_parameter_that_no_rule_places_is_refused_by_name() -> None:
    table = ParameterTable()
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    table.add("0.weight", Placement(shape=(2, 2)))
    with pytest.raises(ConfigError, match=r"no rule of the plan places .*0\.bias, 1\.weight;"):
        table.pieces(model)


def test_a_parameter_that_two_rules_place_is_refused_by_name() -> None:
    table = ParameterTable()
    table.add("w", Placement(shape=(2, 2)))
    with pytest.raises(ConfigError, match="two rules of the plan place the parameter 'w'"):
        table.add("w", Placement(shape=(2, 2)))


def test_the_table_reads_as_a_mapping() -> None:
    model = nn.Linear(3, 2)
    table = ParameterTable.of(model)
    assert dict(table) == {"weight": Placement(shape=(2, 3)), "bias": Placement(shape=(2,))}
    assert (len(table), "bias" in table, "other" in table) == (2, True, False)


@pytest.mark.parametrize(
    ("placement", "replicated"),
    [
        (Placement(shape=(4,)), ("tp",)),
        (Placement(shape=(4,), sharded=((0, "tp"),)), ()),
        (Placement(shape=(4,), sharded=((0, "tp//2"),)), ("tp%2",)),
        (Placement(shape=(4,), data="edp"), ("ep", "etp")),
        (Placement(shape=(4, 4), sharded=((1, "ep"),), data="edp"), ("etp",)),
    ],
)
def test_a_parameter_is_replicated_over_the_model_axes_that_do_not_shard_it(
    placement: Placement, replicated: tuple[str, ...]
) -> None:
    assert placement.replicated() == replicated


def test_without_parallelism_a_piece_is_the_parameter_itself() -> None:
    model = nn.Linear(3, 2)
    model.weight.grad = torch.ones(2, 3)
    weight, bias = ParameterTable.of(model).pieces(model)
    assert (weight.name, weight.box, weight.shape) == ("weight", Box((0, 0), (2, 3)), (2, 3))
    assert weight.counted
    assert weight.grad is not None
    assert bias.grad is None
    weight.tensor.fill_(5.0)
    weight.grad.fill_(7.0)
    assert model.weight.eq(5).all()
    assert model.weight.grad.eq(7).all()
    assert not weight.tensor.requires_grad


# ---- pieces tile ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """What one rank holds of one parameter."""

    name: str
    box: Box
    local_shape: tuple[int, ...]
    values: Tensor
    counted: bool
    nonzero_padding: int


def held(pieces: Iterable[Piece]) -> list[Held]:
    """A record of each piece."""
    return [
        Held(
            name=piece.name,
            box=piece.box,
            local_shape=tuple(piece.local.shape),
            values=piece.tensor.clone(),
            counted=piece.counted,
            nonzero_padding=int(piece.local.count_nonzero() - piece.tensor.count_nonzero()),
        )
        for piece in pieces
    ]


def check_tiling(ranks: Sequence[Sequence[Held]], shapes: dict[str, tuple[int, ...]]) -> None:
    """Counted pieces cover every element once; all pieces cover each element equally often."""
    once = {name: torch.zeros(shape) for name, shape in shapes.items()}
    copies = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for piece in (piece for pieces in ranks for piece in pieces):
        assert tuple(piece.values.shape) == piece.box.size
        copies[piece.name][piece.box.slices] += 1
        once[piece.name][piece.box.slices] += piece.counted
    for name in shapes:
        assert once[name].eq(1).all(), name
        assert copies[name].unique().numel() == 1, name


def check_values(ranks: Sequence[Sequence[Held]], wholes: dict[str, Tensor]) -> None:
    """Every piece holds its part of the whole, bit for bit, and zeros in the padding."""
    for piece in (piece for pieces in ranks for piece in pieces):
        assert torch.equal(piece.values, wholes[piece.name][piece.box.slices]), piece.name
        assert piece.nonzero_padding == 0


IMAGINED = [
    {},
    {"tp": 2, "cp": 2},
    {"tp": 4, "ep": 2},
    {"tp": 2, "ep": 4, "etp": 2},
    {"tp": 1, "ep": 2, "etp": 4},
]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("degrees", IMAGINED, ids=str)
def test_pieces_of_the_model_axes_tile_and_start_as_the_whole_model(
    degrees: dict[str, int],
) -> None:
    config = resized(CONFIG, num_layers=1, num_key_heads=2)
    wholes = whole_values(config)
    ranks = imagined(8, **degrees)
    pieces = []
    for topology in ranks:
        model = Toy(config)
        table = parallelize(model, topology, plan(config))
        initialise(table.pieces(model), rule, SEED)
        pieces.append(held(table.pieces(model)))
    check_values(pieces, wholes)
    # Without FSDP the data ranks hold copies; one replica is the model.
    for view, data in ((False, "dp-cp"), (True, "edp")):
        shapes = {n: tuple(w.shape) for n, w in wholes.items() if ("experts" in n) == view}
        replica = [
            [piece for piece in of_rank if piece.name in shapes]
            for topology, of_rank in zip(ranks, pieces, strict=True)
            if topology.rank(data) == 0
        ]
        check_tiling(replica, shapes)


SHARDED = [
    {},
    {"tp": 2, "cp": 2},
    {"tp": 4, "ep": 4, "etp": 2},
    {"tp": 2, "pp": 2, "ep": 2},
]


@pytest.fixture(scope="module")
def sharded() -> list[list[list[Held]]]:
    """For every layout what each rank holds under FSDP."""

    def on_a_rank() -> list[list[Held]]:
        parameters._BLOCK = 40
        found = []
        for degrees in SHARDED:
            model = build(
                lambda: Toy(CONFIG),
                Topology(Layout(8, **degrees)),
                plan(CONFIG),
                head=HEAD,
                tail=TAIL,
                precision=Precision(),
            )
            model.initialise(rule, SEED)
            found.append(held(model.pieces()))
        return found

    return [list(ranks) for ranks in zip(*launch(on_a_rank, 8, timeout=300), strict=True)]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("index", range(len(SHARDED)), ids=map(str, SHARDED))
def test_pieces_under_fsdp_tile_and_start_as_the_whole_model(
    sharded: list[list[list[Held]]], index: int
) -> None:
    wholes = whole_values(CONFIG)
    check_tiling(sharded[index], {name: tuple(w.shape) for name, w in wholes.items()})
    check_values(sharded[index], wholes)


def test_the_cases_have_uneven_empty_and_padded_pieces(sharded: list[list[list[Held]]]) -> None:
    pieces = [piece for ranks in sharded for pieces in ranks for piece in pieces]
    sizes: dict[str, set[int]] = defaultdict(set)
    for piece in sharded[0][0] + sharded[0][-1]:
        sizes[piece.name].add(piece.box.numel)
    assert any(len(found) > 1 for found in sizes.values()), "uneven shards"
    assert any(piece.box.numel == 0 for piece in pieces), "empty shards"
    assert any(piece.local_shape != piece.box.size for piece in pieces), "vocabulary padding"


# ---- initialisation ------------------------------------------------------------------------


def drawn(name: str, shape: tuple[int, ...], seed: int = 0, std: float = 1.0) -> Tensor:
    """A whole parameter of one name."""
    holder = nn.Module()
    setattr(holder, name, nn.Parameter(torch.empty(shape)))
    pieces = ParameterTable.of(holder).pieces(holder)
    initialise(pieces, lambda _: ("normal", std), seed)
    return pieces[0].tensor


def test_names_seeds_blocks_and_matrices_of_a_stack_are_drawn_apart(small_blocks: None) -> None:
    a = drawn("a", (3, 20, 4))
    assert torch.equal(a, drawn("a", (3, 20, 4)))
    assert not torch.equal(a, drawn("b", (3, 20, 4)))
    assert not torch.equal(a, drawn("a", (3, 20, 4), seed=1))
    blocks = a.view(6, 10, 4)  # of 40 elements
    assert all(
        not torch.equal(blocks[i], blocks[j]) for i, j in product(range(6), repeat=2) if i < j
    )
    assert Counter(a.flatten().tolist()).most_common(1)[0][1] == 1


@pytest.mark.parametrize("shape", [(4096,), (64, 64), (4, 32, 32)])
def test_the_standard_deviation_is_the_one_asked_for(shape: tuple[int, ...]) -> None:
    values = drawn("w", shape, std=0.02).double()
    # Of 4096 draws: the mean is within 5 of its deviations, the deviation within 5 of its own.
    assert abs(values.mean().item()) < 5 * 0.02 / 64
    assert abs(values.std().item() / 0.02 - 1) < 5 / (2 * 4096) ** 0.5


def test_a_vector_and_one_row_longer_than_a_block_are_drawn(small_blocks: None) -> None:
    assert drawn("v", (100,)).ne(0).all()
    assert drawn("w", (3, 100)).ne(0).all()


def test_values_do_not_depend_on_the_dtype_of_the_run() -> None:
    single = drawn("w", (8, 8))
    torch.set_default_dtype(torch.float64)
    try:
        double = drawn("w", (8, 8))
    finally:
        torch.set_default_dtype(torch.float32)
    assert double.dtype == torch.float64
    assert torch.equal(double, single.double())


def test_torchs_own_generator_is_not_touched() -> None:
    before = torch.get_rng_state()
    drawn("w", (8, 8))
    assert torch.equal(torch.get_rng_state(), before)


def test_constants_and_unknown_kinds() -> None:
    linear = nn.Linear(2, 2)
    pieces = ParameterTable.of(linear).pieces(linear)
    initialise(pieces, lambda name: ("ones" if name == "weight" else "zeros", 0.0), 0)
    assert linear.weight.eq(1).all()
    assert linear.bias.eq(0).all()
    with pytest.raises(ConfigError, match="'uniform' of weight; there are 'normal', 'ones'"):
        initialise(pieces, lambda _: ("uniform", 1.0), 0)
