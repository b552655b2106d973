"""The law: under every layout the toy trains as it does in one process, in float64.

Three clipped AdamW steps; compared are the losses, the global norms, every gradient of the first
step and every parameter after the last, on every rank. What is left is the order of sums.
"""

import pytest
import torch
from torch import nn

from fivefold.parallel_core.data_parallel_config import DataParallelConfig
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.ledger import CommLedger
from fivefold.parallel_core.pipeline import keep_stage
from fivefold.parallel_core.plan import check_plan, parallelize, tie
from fivefold.parallel_core.sequence_split import ContextConfig
from fivefold.parallel_core.styles import ColumnParallel, Replicate, RowParallel, SplitContext
from fivefold.parallel_core.topology import Topology

from .imagined import imagined
from .rig import Case, make_job, parallel_run, plain_run, worst
from .toy import HEAD, TAIL, Toy, ToyConfig, plan, resized

TOLERANCE = 1e-12
DENSE, MIXTURE = ToyConfig(), ToyConfig(num_experts=4)
FREEING = DataParallelConfig(form="zero3")

CASES = [
    Case(degrees={}),
    Case(degrees={"tp": 2}, sequence=False),
    Case(degrees={"tp": 2, "pp": 2}, sequence=False, microbatch_size=2),
    Case(degrees={"tp": 2}, config=resized(DENSE, tied=True), microbatch_size=2),
    Case(degrees={"tp": 4}, config=resized(DENSE, label_smoothing=0.1), microbatch_size=2),
    Case(degrees={"tp": 4}, config=resized(DENSE, num_key_heads=2)),
    Case(degrees={"tp": 4}, config=resized(DENSE, num_key_heads=1), sequence=False),
    Case(
        degrees={"tp": 4, "pp": 2},
        config=resized(MIXTURE, num_key_heads=2, tied=True, bias=False),
        data=FREEING,
    ),
    Case(degrees={}, packed=True),
    Case(
        degrees={"cp": 4, "tp": 2},
        context=ContextConfig(attention="ring", split="zigzag"),
        packed=True,
        microbatch_size=4,
    ),
    Case(
        degrees={"cp": 2, "tp": 2},
        config=resized(MIXTURE, num_key_heads=2),
        context=ContextConfig(attention="heads", split="zigzag"),
        packed=True,
        regions="selective",
        microbatch_size=2,
    ),
    Case(
        degrees={"cp": 2, "pp": 2, "tp": 2},
        schedule="InterleavedZeroBubble",
        config=resized(DENSE, num_layers=5),
        stages_per_rank=2,
        regions="full",
        packed=True,
        microbatch_size=2,
    ),
    Case(
        degrees={"cp": 4, "pp": 2},
        context=ContextConfig(attention="ring"),
        packed=True,
        microbatch_size=2,
    ),
    Case(degrees={"cp": 4}, microbatch_size=2, data=FREEING),
    Case(degrees={"tp": 2, "cp": 2, "pp": 2}, microbatch_size=2, data=FREEING),
    Case(degrees={"pp": 4}, config=resized(DENSE, num_layers=5)),
    Case(
        degrees={"tp": 2, "pp": 2},
        config=resized(DENSE, num_layers=5),
        stages_per_rank=2,
        microbatch_size=2,
    ),
    Case(degrees={"ep": 2, "etp": 4}, config=MIXTURE),
    Case(degrees={"tp": 2, "ep": 4}, config=MIXTURE, data=FREEING),
    Case(degrees={"tp": 2, "cp": 2, "ep": 4, "etp": 2}, config=MIXTURE, microbatch_size=4),
    Case(
        degrees={"tp": 2, "cp": 2, "ep": 2, "etp": 2, "pp": 2},
        config=resized(MIXTURE, num_layers=4),
        stages_per_rank=2,
        microbatch_size=4,
    ),
]


@pytest.fixture(scope="module")
def errors() -> list[list[tuple[float, str]]]:
    """For every case the largest error of each rank, and of what."""
    references = {
        key: plain_run(key[0], packed=key[1])
        for key in {(case.config, case.packed) for case in CASES}
    }

    def on_a_rank() -> list[tuple[float, str]]:
        found = []
        for case in CASES:
            job = make_job(case)
            found.append(worst(job, parallel_run(job), references[case.config, case.packed]))
        return found

    return [list(ranks) for ranks in zip(*launch(on_a_rank, 8, timeout=500), strict=True)]


@pytest.mark.parametrize("index", range(len(CASES)), ids=map(str, CASES))
def test_eight_ranks_train_as_one(errors: list[list[tuple[float, str]]], index: int) -> None:
    assert max(errors[index]) < (TOLERANCE, "")


@pytest.mark.parametrize("config", [DENSE, MIXTURE, resized(DENSE, tied=True)], ids=str)
def test_the_plan_on_one_rank_trains_as_plain_torch(config: ToyConfig) -> None:
    job = make_job(Case(degrees={}, config=config, microbatch_size=4))
    assert worst(job, parallel_run(job), plain_run(config)) < (TOLERANCE, "")


# ---- what a layer sends --------------------------------------------------------------------

LAYER = resized(DENSE, num_layers=3)


def sent_by_a_layer(sequence: bool) -> dict[tuple[str, str], tuple[int, float]]:
    """Forward and backward of the middle layer on tp=4, from (2, S, 12) float64."""
    topology = Topology(Layout(4, tp=4))
    model = keep_stage(Toy(LAYER).double(), 1, 3, head=HEAD, tail=TAIL)
    parallelize(model, topology, plan(LAYER, sequence=sequence))
    x = torch.randn(2, 4 if sequence else 16, 12, dtype=torch.float64, requires_grad=True)
    with CommLedger(topology) as ledger:
        model(x).sum().backward()
    return {key: (entry.calls, entry.bytes) for key, entry in ledger.entries.items()}


def test_a_layer_sends_what_the_paper_counts() -> None:
    """Section 4.2.2: 4 all-reduces; with sequence parallelism 4 + 4, and 2 gathers once more."""
    found = launch(lambda: (sent_by_a_layer(True), sent_by_a_layer(False)), 4, timeout=300)
    size = 2 * 16 * 12 * 8 * 3 / 4  # of a whole activation, through a ring of 4
    for with_sequence, without in found:
        assert with_sequence == {
            ("all_gather", "tp"): (6, 6 * size),
            ("reduce_scatter", "tp"): (4, 4 * size),
        }
        assert without == {("all_reduce", "tp"): (4, 4 * 2 * size)}


# ---- plans ---------------------------------------------------------------------------------


def pair() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))


def test_a_module_under_two_patterns_is_refused_with_both() -> None:
    (topology,) = imagined(1)
    with pytest.raises(ConfigError, match=r"module '0' falls under 2 patterns .*: \*, 0;"):
        parallelize(pair(), topology, {"*": Replicate(), "0": ColumnParallel()})


def test_a_star_is_one_part_of_a_name() -> None:
    (topology,) = imagined(1)
    model = nn.ModuleDict({"layers": nn.ModuleDict({"0": pair()})})
    table = parallelize(model, topology, {"layers.*.*": Replicate()})
    assert set(table) == {"layers.0.0.weight", "layers.0.1.weight"}
    with pytest.raises(ConfigError, match="no rule of the plan"):
        parallelize(nn.ModuleDict({"layers": pair()}), topology, {"layers.*.*": Replicate()})


def test_a_dot_in_a_pattern_is_a_dot() -> None:
    (topology,) = imagined(1)
    model = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(2, 2)}), "axb": nn.Linear(2, 2)})
    with pytest.raises(ConfigError, match=r"places the parameter\(s\) axb\.weight, axb\.bias;"):
        parallelize(model, topology, {"a.b": Replicate()})


def test_an_uncovered_parameter_is_refused() -> None:
    (topology,) = imagined(1)
    with pytest.raises(ConfigError, match=r"no rule of the plan places .* 1\.weight;"):
        parallelize(pair(), topology, {"0": ColumnParallel()})


def test_a_parameter_under_two_styles_is_refused() -> None:
    (topology,) = imagined(1)
    model = nn.ModuleDict({"outer": pair()})
    with pytest.raises(ConfigError, match=r"two rules of the plan place .*'outer\.0\.weight'"):
        parallelize(model, topology, {"outer": Replicate(), "outer.0": ColumnParallel()})


def test_what_does_not_divide_is_refused_with_the_numbers() -> None:
    topology = imagined(4, tp=4)[0]
    with pytest.raises(ConfigError, match=r"1\.weight of shape \(6, 6\): dim 1 of 6 .* tp of 4"):
        parallelize(pair(), topology, {"0": Replicate(), "1": RowParallel()})


def test_a_pattern_that_names_nothing_is_refused() -> None:
    whole = {**plan(DENSE), "layers.*.attention.kore": SplitContext()}
    with pytest.raises(ConfigError, match=r"layers\.\*\.attention\.kore name no module of Toy"):
        check_plan(Toy(DENSE), whole)
    check_plan(Toy(MIXTURE), plan(MIXTURE))


def test_tied_weights_are_tied_again() -> None:
    config = resized(DENSE, tied=True)
    model = Toy(config)
    table = parallelize(model, imagined(2, tp=2)[1], plan(config))
    assert model.lm_head.weight is model.embed_tokens.weight
    assert [piece.name for piece in table.pieces(model)].count("embed_tokens.weight") == 1
    model.to("meta").to_empty(device="cpu")
    assert model.lm_head.weight is not model.embed_tokens.weight
    tie(model)
    assert model.lm_head.weight is model.embed_tokens.weight
    tie(nn.Linear(2, 2))  # a model that ties nothing
