"""What each style makes of a module and enters in the table, on imagined ranks."""

import pytest
import torch
from torch import nn

from fivefold.parallel_core.box import Box
from fivefold.parallel_core.context import GatheredContext, SplitPositions
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.linear_group import LinearGroup
from fivefold.parallel_core.losses import CrossEntropy
from fivefold.parallel_core.parameters import ParameterTable, Placement
from fivefold.parallel_core.styles import (
    ColumnParallel,
    ContextPositions,
    Replicate,
    RowParallel,
    SplitContext,
    Style,
    SumOver,
    VocabParallel,
    VocabParallelLoss,
    pad_rows,
    shard_parameter,
)
from fivefold.parallel_core.tensor_parallel import (
    ColumnParallelLinears,
    RowParallelLinear,
    VocabParallelCrossEntropy,
    VocabParallelEmbedding,
)

from .imagined import imagined


def applied(
    style: Style, module: nn.Module, rank: int = 1, **degrees: int
) -> tuple[nn.Module, ParameterTable]:
    """The module that stands at "m" on one rank of 4."""
    table = ParameterTable(imagined(4, **degrees)[rank])
    return style.apply(module, "m", table), table


def test_column_parallel_cuts_the_rows_and_the_bias() -> None:
    linear = nn.Linear(3, 8)
    weight, bias = linear.weight.detach(), linear.bias.detach()
    module, table = applied(ColumnParallel(), linear, tp=4)
    assert isinstance(module, ColumnParallelLinears)
    assert [name for name, _ in module.named_parameters()] == ["weight", "bias"]
    assert torch.equal(module.get_parameter("weight"), weight[2:4])
    assert torch.equal(module.get_parameter("bias"), bias[2:4])
    assert table["m.weight"] == Placement(shape=(8, 3), sharded=((0, "tp"),))
    assert table["m.bias"] == Placement(shape=(8,), sharded=((0, "tp"),))


def test_a_group_keeps_the_names_of_its_linears() -> None:
    group = LinearGroup({"q": nn.Linear(3, 8, bias=False), "k": nn.Linear(3, 4, bias=False)})
    module, table = applied(ColumnParallel(), group, tp=2)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "q.weight": (4, 3),
        "k.weight": (2, 3),
    }
    assert set(table) == {"m.q.weight", "m.k.weight"}


@pytest.mark.parametrize(
    ("heads", "rows", "placement"),
    [
        (8, [[0, 1], [2, 3], [4, 5], [6, 7]], Placement(shape=(8, 3), sharded=((0, "tp"),))),
        (
            2,
            [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7]],
            Placement(shape=(8, 3), sharded=((0, "tp//2"),), partial=("tp%2",)),
        ),
        (1, [list(range(8))] * 4, Placement(shape=(8, 3), partial=("tp",))),
    ],
)
def test_fewer_heads_than_ranks_are_held_by_neighbours(
    heads: int, rows: list[list[int]], placement: Placement
) -> None:
    counted = []
    for rank in range(4):
        group = LinearGroup({"q": nn.Linear(3, 8), "k": nn.Linear(3, 8)})
        weight = group.k.weight.detach()
        module, table = applied(ColumnParallel(heads={"k": heads}), group, rank, tp=4)
        assert torch.equal(module.get_parameter("k.weight"), weight[rows[rank]])
        assert table["m.k.weight"] == placement
        assert table["m.q.weight"] == Placement(shape=(8, 3), sharded=((0, "tp"),))
        holder = nn.Module()
        holder.m = module
        piece = {piece.name: piece for piece in table.pieces(holder)}["m.k.weight"]
        assert piece.box == Box((rows[rank][0], 0), (len(rows[rank]), 3))
        counted.append(piece.counted)
    copies = max(4 // heads, 1)
    assert counted == [rank % copies == 0 for rank in range(4)]


def test_heads_and_ranks_of_which_neither_divides_the_other_are_refused() -> None:
    message = r"m of 3 heads cannot be split over tp of 2 ranks; .* divisor or a multiple of 3"
    with pytest.raises(ConfigError, match=message):
        applied(ColumnParallel(heads={"": 3}), nn.Linear(3, 6), tp=2)


@pytest.mark.parametrize("sequence", [True, False])
def test_row_parallel_cuts_the_columns_and_keeps_the_bias(sequence: bool) -> None:
    module, table = applied(RowParallel(sequence), nn.Linear(8, 3), tp=4)
    assert isinstance(module, RowParallelLinear)
    assert tuple(module.weight.shape) == (3, 2)
    assert table["m.weight"] == Placement(shape=(3, 8), sharded=((1, "tp"),))
    partial = ("tp",) if sequence else ()
    assert table["m.bias"] == Placement(shape=(3,), partial=partial)


@pytest.mark.parametrize("tp", [1, 4])
@pytest.mark.parametrize("sequence", [True, False])
def test_a_replicated_parameter_is_partial_where_ranks_see_other_tokens(
    tp: int, sequence: bool
) -> None:
    block = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))
    module, table = applied(Replicate(sequence), block, tp=tp)
    assert module is block
    partial = ("tp",) if sequence and tp > 1 else ()
    assert {name: row.partial for name, row in table.items()} == dict.fromkeys(
        ("m.0.weight", "m.0.bias", "m.1.weight", "m.1.bias"), partial
    )


@pytest.mark.parametrize(("multiple", "rows"), [(1, 10), (4, 12), (16, 16)])
def test_the_vocabulary_is_padded_with_zeros_that_the_table_does_not_know(
    multiple: int, rows: int
) -> None:
    for rank in range(4):
        embedding = nn.Embedding(37, 2)
        nn.init.ones_(embedding.weight)
        module, table = applied(VocabParallel(multiple=multiple), embedding, rank, tp=4)
        assert isinstance(module, VocabParallelEmbedding)
        assert tuple(module.weight.shape) == (rows, 2)
        true = min(max(37 - rank * rows, 0), rows)
        assert module.weight[:true].eq(1).all()
        assert module.weight[true:].eq(0).all()
        assert table["m.weight"] == Placement(shape=(37, 2), sharded=((0, "tp"),))


def test_the_output_layer_is_padded_with_its_bias() -> None:
    module, table = applied(VocabParallel(), nn.Linear(2, 37), tp=4)
    assert isinstance(module, ColumnParallelLinears)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "weight": (10, 2),
        "bias": (10,),
    }
    assert table["m.bias"] == Placement(shape=(37,), sharded=((0, "tp"),))


def test_padding_rows_keeps_values_and_whether_they_are_trained() -> None:
    frozen = nn.Parameter(torch.arange(6.0).view(3, 2), requires_grad=False)
    padded = pad_rows(frozen, 4)
    assert padded.tolist() == [[0, 1], [2, 3], [4, 5], [0, 0]]
    assert not padded.requires_grad
    assert pad_rows(nn.Parameter(torch.ones(5)), 4).tolist() == [1] * 5 + [0] * 3


def test_a_style_works_on_meta() -> None:
    with torch.device("meta"):
        linear = nn.Linear(3, 8)
    module, _ = applied(ColumnParallel(), linear, tp=4)
    assert module.get_parameter("weight").is_meta
    assert tuple(module.get_parameter("weight").shape) == (2, 3)


def test_a_cut_parameter_frees_the_whole_one_and_stays_frozen() -> None:
    linear = nn.Linear(4, 8, bias=False).requires_grad_(False)
    module, _ = applied(ColumnParallel(), linear, tp=4)
    weight = module.get_parameter("weight")
    assert weight.untyped_storage().nbytes() == 2 * 4 * 4
    assert not weight.requires_grad


def test_a_parameter_may_be_cut_along_several_dims() -> None:
    boxes = []
    for topology in imagined(4, tp=2, cp=2):
        module, table = nn.Module(), ParameterTable(topology)
        module.w = nn.Parameter(torch.arange(24.0).view(2, 3, 4))
        placement = Placement(shape=(2, 3, 4), sharded=((0, "cp"), (2, "tp")))
        shard_parameter(module, "m", "w", table, placement)
        holder = nn.Module()
        holder.m = module
        (piece,) = table.pieces(holder)
        assert torch.equal(piece.tensor, torch.arange(24.0).view(2, 3, 4)[piece.box.slices])
        boxes.append(piece.box)
    assert boxes == [Box((c, 0, 2 * t), (1, 3, 2)) for c in range(2) for t in range(2)]


@pytest.mark.parametrize("style", [ColumnParallel(), RowParallel()], ids=["column", "row"])
def test_what_does_not_divide_is_refused_with_the_numbers(style: Style) -> None:
    with pytest.raises(
        ConfigError,
        match=r"m\.weight of shape \(6, 6\): dim [01] of 6 .*tp of 4 ranks.*divisor of 6",
    ):
        applied(style, nn.Linear(6, 6), tp=4)


@pytest.mark.parametrize(
    ("style", "module", "message"),
    [
        (
            ColumnParallel(),
            nn.Embedding(4, 4),
            "ColumnParallel at 'm' needs a Linear or LinearGroup",
        ),
        (RowParallel(), nn.LayerNorm(4), "RowParallel at 'm' needs a Linear, found LayerNorm"),
        (VocabParallel(), nn.LayerNorm(4), "needs a Linear or Embedding, found LayerNorm"),
        (VocabParallelLoss(4), nn.Identity(), "needs a CrossEntropy, found Identity"),
        (SumOver("tp"), nn.Linear(4, 4), "needs a Identity, found Linear"),
    ],
)
def test_a_module_of_another_kind_is_refused(style: Style, module: nn.Module, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        applied(style, module, tp=2)


@pytest.mark.parametrize("option", [{"padding_idx": 0}, {"max_norm": 1.0}, {"sparse": True}])
def test_an_embedding_with_options_that_would_be_lost_is_refused(option: dict[str, object]) -> None:
    (name,) = option
    with pytest.raises(ConfigError, match=f"the embedding has {name}={option[name]}"):
        applied(VocabParallel(), nn.Embedding(8, 4, **option), tp=2)  # type: ignore[arg-type]


def test_the_loss_keeps_its_options() -> None:
    module, table = applied(VocabParallelLoss(37), CrossEntropy(3, 0.1), tp=4)
    assert isinstance(module, VocabParallelCrossEntropy)
    assert (module.vocab_size, module.ignore_index, module.label_smoothing) == (37, 3, 0.1)
    assert module.axis.size == 4
    assert not table


def test_context_styles_stand_aside_on_one_rank() -> None:
    core, positions = nn.Identity(), nn.Identity()
    assert applied(SplitContext(), core, tp=2)[0] is core
    assert applied(ContextPositions(), positions, tp=2)[0] is positions
    assert isinstance(applied(SplitContext(), core, cp=2)[0], GatheredContext)
    assert isinstance(applied(ContextPositions(), positions, cp=2)[0], SplitPositions)


def test_a_sum_over_one_rank_is_the_count_itself() -> None:
    module, _ = applied(SumOver("cp"), nn.Identity(), tp=2)
    count = torch.tensor([1.0, 2.0])
    assert module(count) is count
