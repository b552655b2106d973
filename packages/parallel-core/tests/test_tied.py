"""One parameter at both ends of a pipeline: held twice, trained, saved and counted once."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import FileSystemReader

from fivefold.parallel_core.build import ParallelModel, build
from fivefold.parallel_core.checkpoint import Checkpoints, load_parts
from fivefold.parallel_core.data_parallel_config import DataParallelConfig
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.gradients import sum_partial
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.ledger import CommLedger
from fivefold.parallel_core.parameters import ParameterTable
from fivefold.parallel_core.pipeline_config import PipelineConfig
from fivefold.parallel_core.styles import Plan, Replicate
from fivefold.parallel_core.tied import Twin, check_ends, tied_names
from fivefold.parallel_core.topology import Topology

from .imagined import imagined
from .rig import Case, Job, make_job, parallel_run, plain_run, worst
from .test_checkpoint import copies, differing, parts_of
from .toy import HEAD, TAIL, Toy, ToyConfig, plan, resized

CONFIG = ToyConfig(num_layers=4, tied=True, num_key_heads=2)
V_SHAPED = {"schedule": "DualPipeV", "stages_per_rank": 2}
EMBEDDING = "embed_tokens.weight"
CHAIN = [
    Case(degrees={"tp": 4}, config=CONFIG),
    Case(degrees={"tp": 2, "pp": 2}, config=CONFIG, schedule="ZBVZeroBubble", stages_per_rank=2),
    Case(degrees={"tp": 2, "pp": 2}, config=CONFIG),
]
FORMS = [
    Case(degrees={"pp": 2}, config=CONFIG, data=DataParallelConfig(form=form), **schedule)  # type: ignore[arg-type]
    for form in ("replicate", "zero1", "zero2", "zero3")
    for schedule in ({}, V_SHAPED)
]
"""Key heads that two ranks hold; both ends on one rank; an end on each of two ranks."""


@dataclass
class Rank:
    """What one rank found."""

    differing: list[str]
    pieces: list[dict[str, bool]]
    error: float
    sent_by_copies: dict[tuple[str, str], tuple[int, float]]
    sent: dict[tuple[str, str], tuple[int, float]]
    equal_after: dict[str, torch.Tensor]


def travel(folder: Path, path: Path, third: object) -> Rank:
    changed, pieces, sent = [], [], []
    for index, case in enumerate(CHAIN):
        job = make_job(case)
        load_parts(path, parts_of(job))
        job.optimizer.set_steps(2)
        changed += differing(job, WHOLES)
        pieces.append({piece.name: piece.counted for piece in job.pieces})
        path = Checkpoints(folder / str(index + 1)).save(2, parts_of(job), {})
        sent.append(sent_by_the_sums(job))
        zero_gradients(job)
    error, _ = worst(job, parallel_run(job, steps=1), third)  # type: ignore[arg-type]
    after = {p.name: p.tensor.clone() for p in job.pieces if p.name == EMBEDDING}
    return Rank(changed, pieces, error, sent[0], sent[-1], after)


def zero_gradients(job: Job) -> None:
    for piece in job.pieces:
        piece.parameter.grad = None


def sent_by_the_sums(job: Job) -> dict[tuple[str, str], tuple[int, float]]:
    job.runner.train(*job.data(), 1.0)
    with CommLedger(job.topology) as ledger:
        sum_partial(job.pieces, job.topology)
    return {key: (entry.calls, entry.bytes) for key, entry in ledger.entries.items()}


WHOLES: dict[str, torch.Tensor] = {}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Rank]]:
    """A run of 2 steps in one process that goes through the chain and trains on at its end."""
    folder = tmp_path_factory.mktemp("tied")
    alone = make_job(Case(degrees={}, config=CONFIG, microbatch_size=8))
    parallel_run(alone, steps=2)
    WHOLES.update(copies(alone))
    path = Checkpoints(folder / "0").save(2, parts_of(alone), {})
    third = parallel_run(alone, steps=1)
    return folder, launch(travel, 4, folder, path, third, timeout=300)


def test_checkpoints_pass_through_copies_and_ends_bit_for_bit(
    ranks: tuple[Path, list[Rank]],
) -> None:
    assert [rank.differing for rank in ranks[1]] == [[]] * 4
    assert max(rank.error for rank in ranks[1]) < 1e-12


def test_a_tied_parameter_is_saved_once_under_its_first_name(
    ranks: tuple[Path, list[Rank]],
) -> None:
    for index in range(1, len(CHAIN) + 1):
        (path,) = (ranks[0] / str(index)).iterdir()
        stored = FileSystemReader(path).read_metadata().state_dict_metadata
        assert set(stored) == set(WHOLES)
        for name, tensor in stored.items():
            chunks = sum(chunk.sizes.numel() for chunk in tensor.chunks)
            assert chunks == tensor.size.numel(), name


def test_both_ends_have_it_and_one_counts_it(ranks: tuple[Path, list[Rank]]) -> None:
    on_one_rank = [rank.pieces[1].get(EMBEDDING) for rank in ranks[1]]
    assert on_one_rank == [True, True, None, None]
    on_two = [rank.pieces[2][EMBEDDING] for rank in ranks[1]]
    assert on_two == [True, True, False, False]
    assert not any("lm_head.weight" in pieces for rank in ranks[1] for pieces in rank.pieces)


def test_the_ends_stay_equal_bit_for_bit(ranks: tuple[Path, list[Rank]]) -> None:
    for first, last in ((0, 2), (1, 3)):
        ends = [ranks[1][rank].equal_after[EMBEDDING] for rank in (first, last)]
        assert torch.equal(*ends)


def test_the_ends_exchange_one_gradient(ranks: tuple[Path, list[Rank]]) -> None:
    """An all-reduce over two ranks sends as many bytes as it has: half of the padded vocabulary."""
    for rank in ranks[1]:
        assert rank.sent["all_reduce", "pp-ends"] == (1, 38 / 2 * CONFIG.hidden_size * 8)


def test_ranks_with_the_same_key_head_exchange_its_gradient(
    ranks: tuple[Path, list[Rank]],
) -> None:
    """Four ranks, two key heads: each pair sends keys and values of one head, all layers at once.

    An all-reduce over two ranks sends as many bytes as it has.
    """
    head_dim = CONFIG.hidden_size // CONFIG.num_heads
    of_a_head = head_dim * (CONFIG.hidden_size + 1)  # with its bias
    for rank in ranks[1]:
        found = rank.sent_by_copies["all_reduce", "tp%2"]
        assert found == (1, CONFIG.num_layers * 2 * of_a_head * 8)


# ---- forms of data parallelism ---------------------------------------------------------------


def errors_of_forms() -> list[tuple[float, str]]:
    reference = plain_run(CONFIG)
    jobs = (make_job(case) for case in FORMS)
    return [worst(job, parallel_run(job), reference) for job in jobs]


def test_the_ends_train_as_one_whatever_the_data_ranks_shard() -> None:
    for errors in launch(errors_of_forms, 4, timeout=300):
        assert max(errors) < (1e-12, "")


# ---- names and refusals --------------------------------------------------------------------


def test_the_first_name_of_a_parameter_is_its_own() -> None:
    assert tied_names(Toy(CONFIG)) == {"lm_head.weight": EMBEDDING}
    assert tied_names(Toy(resized(CONFIG, tied=False))) == {}


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("layers.1.up", "layers.0.up"),
        ("lm_head.weight", "layers.0.up"),
        ("norm.bias", "norm.weight"),
    ],
)
def test_only_the_ends_of_a_pipeline_can_share(name: str, original: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} and {original} are one parameter; .* nothing"):
        check_ends({name: original}, HEAD, TAIL)
    check_ends({"lm_head.weight": EMBEDDING}, HEAD, TAIL)


def built(rank: int, styles: Plan) -> ParallelModel:
    """A rank's part under a V-shaped schedule."""
    topology, pipeline = imagined(4, pp=2, tp=2)[rank], PipelineConfig(**V_SHAPED)
    return build(lambda: Toy(CONFIG), topology, styles, head=HEAD, tail=TAIL, pipeline=pipeline)


def test_both_ends_on_one_rank_are_twins() -> None:
    assert [len(built(rank, plan(CONFIG)).twins) for rank in range(4)] == [1, 1, 0, 0]


def test_two_ways_to_lay_out_one_parameter_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"lm_head\.weight and embed_tokens\.weight are one"):
        built(0, {**plan(CONFIG), "lm_head": Replicate()})


def test_a_twin_follows_and_hands_over_its_gradient() -> None:
    first, last = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    twin = Twin(ParameterTable(), first, "weight", last, "weight")
    twin.hand_over()
    assert first.weight.grad is None
    twin.refresh()
    assert torch.equal(last.weight, first.weight)
    last.weight.grad = torch.ones(2, 2)
    twin.hand_over()
    assert first.weight.grad is not None
    assert first.weight.grad.eq(1).all()
    assert last.weight.grad is None
    last.weight.grad = torch.ones(2, 2)
    twin.hand_over()
    assert first.weight.grad.eq(2).all()


def test_a_rank_between_the_ends_holds_nothing_of_it() -> None:
    table = ParameterTable(Topology.local())
    assert not table.tie("lm_head.weight", EMBEDDING)
    assert len(table) == 0
