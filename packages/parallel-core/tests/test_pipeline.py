"""Pipelines: which layers go where, what cannot run, and what the runners do beside training.

That training through stages equals one process is in test_plan.
"""

import logging
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.launcher import disconnect, launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.ledger import CommLedger
from fivefold.parallel_core.pipeline import LocalRunner, PipelineConfig, keep_stage

from .rig import (
    BATCH,
    LENGTH,
    Case,
    batch,
    make_job,
    num_valid,
    parallel_run,
    plain_model,
    plain_run,
    worst,
)
from .toy import HEAD, TAIL, ToyConfig

DUAL = PipelineConfig(schedule="DualPipeV", stages_per_rank=2)
INTERLEAVED = PipelineConfig(schedule="Interleaved1F1B", stages_per_rank=2)

# ---- pure ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "stages", "legal"),
    [
        ("1F1B", 2, "1"),
        ("1F1B", 0, "1"),
        ("GPipe", 2, "1"),
        ("Interleaved1F1B", 1, "2 or more"),
        ("LoopedBFS", 0, "2 or more"),
        ("ZBVZeroBubble", 1, "2"),
        ("DualPipeV", 3, "2"),
    ],
)
def test_a_schedule_with_the_wrong_number_of_stages_is_refused(
    schedule: str, stages: int, legal: str
) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"'{schedule}' with stages_per_rank={stages}; it has {legal} on each rank",
    ):
        PipelineConfig(schedule=schedule, stages_per_rank=stages)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "num_ranks", "num_microbatches", "message"),
    [
        (PipelineConfig(), 4, 3, "1F1B over 4 pipeline ranks needs at least 4 .* found 3; raise"),
        (INTERLEAVED, 2, 1, "Interleaved1F1B over 2 .* at least 2 .* found 1"),
        (INTERLEAVED, 2, 3, "needs a multiple of 2 microbatches in a step, found 3"),
        (DUAL, 2, 3, "DualPipeV over 2 pipeline ranks needs at least 4 .* found 3"),
        (INTERLEAVED, 1, 2, "2 stages on each rank need a pipeline; pp is 1"),
    ],
)
def test_what_a_schedule_cannot_run_is_refused(
    config: PipelineConfig, num_ranks: int, num_microbatches: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config.check(num_ranks, num_microbatches)


def test_what_a_schedule_can_run_is_let_through() -> None:
    PipelineConfig().check(1, 1)
    PipelineConfig().check(4, 5)
    INTERLEAVED.check(2, 4)
    DUAL.check(2, 4)
    PipelineConfig(schedule="GPipe").check(4, 1)


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_stages_together_are_the_model_under_its_own_names(num_stages: int) -> None:
    config = ToyConfig(num_layers=5)
    names: list[str] = []
    x, _ = batch(config.vocab_size)
    whole = plain_model(config)
    wanted = whole(x)
    for stage in range(num_stages):
        part = keep_stage(plain_model(config), stage, num_stages, head=HEAD, tail=TAIL)
        names += [name for name, _ in part.named_parameters()]
        x = part(x)
    assert sorted(names) == sorted(name for name, _ in whole.named_parameters())
    assert torch.equal(x, wanted)


# ---- one rank ------------------------------------------------------------------------------


@pytest.mark.parametrize("num_microbatches", [1, 2, 8])
def test_the_local_runner_is_the_plain_loop(num_microbatches: int) -> None:
    config = ToyConfig()
    inputs, targets = batch(config.vocab_size)
    plain, model = plain_model(config), plain_model(config)
    wanted = F.cross_entropy(plain(inputs).flatten(0, 1), targets.flatten(), reduction="sum")
    (wanted / 10).backward()
    runner = LocalRunner(model, num_microbatches)
    evaluated = runner.evaluate(inputs, targets)
    assert not evaluated.requires_grad
    assert all(p.grad is None for p in model.parameters())
    trained = runner.train(inputs, targets, 1 / 10)
    for loss in (evaluated, trained):
        torch.testing.assert_close(loss, wanted.detach(), rtol=1e-14, atol=0)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=1e-13)


# ---- 4 ranks -------------------------------------------------------------------------------

CASES = {
    "uneven stages": Case(degrees={"pp": 4}, config=ToyConfig(num_layers=5), microbatch_size=2),
    "interleaved": Case(
        degrees={"pp": 2}, config=ToyConfig(num_layers=5), stages_per_rank=2, microbatch_size=2
    ),
    "tensor": Case(degrees={"pp": 2, "tp": 2}, microbatch_size=2),
}


@dataclass
class Found:
    """What one rank saw.

    Attributes:
        losses: of an evaluation before training, of training, and of an evaluation after.
        gradients_after_evaluation: how many parameters have one.
        worst: largest error of training between the evaluations.
        sent: messages to other stages in an evaluation and in a training step.
    """

    losses: tuple[float, float, float]
    gradients_after_evaluation: int
    worst: float
    sent: tuple[tuple[int, float], tuple[int, float]]


def on_a_rank() -> dict[str, Found]:
    found = {}
    for name, case in CASES.items():
        job = make_job(case)
        before = job.runner.evaluate(*job.data())
        # Torch greets the neighbours whenever it changes between evaluation and training, so the
        # second time in a row is counted.
        with CommLedger(job.topology) as evaluating:
            job.runner.evaluate(*job.data())
        left = sum(piece.grad is not None for piece in job.pieces)
        record = parallel_run(job, steps=1)
        with CommLedger(job.topology) as training:
            job.runner.train(*job.data(), 1.0)
        after = job.runner.evaluate(*job.data())
        error, _ = worst(job, record, plain_run(case.config, steps=1))
        count = num_valid(batch(case.config.vocab_size)[1])
        sent = [ledger["send", "pp"] for ledger in (evaluating, training)]
        found[name] = Found(
            losses=(
                job.total(before.item()) / count,
                record.losses[0],
                job.total(after.item()) / count,
            ),
            gradients_after_evaluation=left,
            worst=error,
            sent=((sent[0].calls, sent[0].bytes), (sent[1].calls, sent[1].bytes)),
        )
    return found


@pytest.fixture(scope="module")
def job() -> list[dict[str, Found]]:
    return launch(on_a_rank, 4, timeout=300)


@pytest.mark.parametrize("name", CASES)
def test_evaluation_gives_the_loss_of_training_and_leaves_nothing(
    job: list[dict[str, Found]], name: str
) -> None:
    reference = plain_run(CASES[name].config, steps=2)
    for found in job:
        before, trained, after = found[name].losses
        assert before == pytest.approx(trained, rel=1e-13)
        assert before == pytest.approx(reference.losses[0], rel=1e-13)
        assert after == pytest.approx(reference.losses[1], rel=1e-12)
        assert found[name].gradients_after_evaluation == 0


@pytest.mark.parametrize("name", CASES)
def test_training_after_an_evaluation_equals_one_process(
    job: list[dict[str, Found]], name: str
) -> None:
    assert max(found[name].worst for found in job) < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_each_border_is_crossed_once_each_way_by_each_microbatch(
    job: list[dict[str, Found]], name: str
) -> None:
    case = CASES[name]
    layout = Layout(4, **case.degrees)  # type: ignore[arg-type]
    num_stages = layout.pp * case.stages_per_rank
    num_microbatches = BATCH // layout.dp // case.microbatch_size
    size = case.microbatch_size * LENGTH // layout.tp * case.config.hidden_size * 8
    for rank, found in enumerate(job):
        pp_rank = layout.coordinates(rank)["pp"]
        stages = range(pp_rank, num_stages, layout.pp)
        forward = num_microbatches * sum(stage < num_stages - 1 for stage in stages)
        backward = num_microbatches * sum(stage > 0 for stage in stages)
        assert found[name].sent == (
            (forward, forward * size),
            (forward + backward, (forward + backward) * size),
        )


def test_too_few_microbatches_are_refused_before_anything_runs() -> None:
    def on_a_rank() -> str:
        try:
            make_job(Case(degrees={"pp": 2}, microbatch_size=8))
        except ConfigError as error:
            return str(error)
        return ""

    for message in launch(on_a_rank, 2, timeout=300):
        assert "needs at least 2 microbatches in a step, found 1" in message


def test_a_schedule_that_fails_raises_and_logs_nothing_above_it() -> None:
    def fail(*_: object) -> None:
        raise ValueError("no forward today")

    def on_a_rank() -> list[str]:
        job = make_job(Case(degrees={"pp": 2}, config=ToyConfig(num_layers=5), stages_per_rank=2))
        logged: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("torch.distributed.pipelining.schedules").addHandler(handler)
        first = dist.get_rank() == 0
        if first:
            job.model.parts[0].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="failed to run forward" if first else "closed"):
            job.runner.train(*job.data(), 1.0)
        if first:
            disconnect()  # as if it had died: the other waits for it in the middle of a step
        return logged

    assert launch(on_a_rank, 2, timeout=300) == [[], []]
