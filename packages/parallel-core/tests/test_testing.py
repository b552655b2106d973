"""The law of equality holds where it should and is broken where it should be."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.testing import Job, Lesson, Record, judge, num_valid, train_plainly

from .rig import BATCH, Case, batch, make_job, plain_model
from .toy import ToyConfig

CONFIG = ToyConfig(num_experts=2, bias=False)
LESSON = Lesson(num_sequences=BATCH, steps=2, losses=("square",))


def plainly(lesson: Lesson = LESSON) -> Record:
    model, (inputs, targets) = plain_model(CONFIG), batch(CONFIG.vocab_size)
    return train_plainly(model, lambda: model(inputs), targets, lesson)


def job_of(degrees: dict[str, int | str]) -> Job:
    job = make_job(Case(degrees=degrees, config=CONFIG))
    count = num_valid(batch(CONFIG.vocab_size)[1])
    return Job(job.model, job.runner, job.data(), count, LESSON)


def on_a_rank(expected: Record) -> tuple[dict[str, float], int]:
    verdict = judge(job_of({"tp": 2, "ep": 2}), expected)
    return dict(verdict.distances), sum(verdict.counted.values())


def test_ranks_that_train_alike_are_near() -> None:
    expected = plainly()
    found = launch(on_a_rank, 4, expected)
    assert all(max(distances.values()) < 1e-12 for distances, _ in found)
    names = {name for distances, _ in found for name in distances}
    scalars = {f"{what}[{step}]" for what in ("loss", "norm", "square") for step in (0, 1)}
    assert names - scalars == {
        f"{kind}[{name}]" for kind in ("gradients", "parameters") for name in expected.parameters
    }
    assert scalars < names
    assert sum(counted for _, counted in found) == sum(
        p.numel() for p in expected.parameters.values()
    )


@pytest.mark.parametrize(
    ("change", "far"),
    [
        ({"learning_rate": 2e-2}, "parameters"),
        ({"clip": 0.1}, "parameters"),
        ({"num_sequences": 4}, "gradients"),
    ],
)
def test_another_lesson_is_seen(change: dict[str, float], far: str) -> None:
    verdict = judge(job_of({}), plainly(replace(LESSON, **change)))  # type: ignore[arg-type]
    worst = max(d for name, d in verdict.distances.items() if name.startswith(far))
    assert worst > 1e-3


def test_a_gradient_that_is_missing_is_seen() -> None:
    expected: Record = plainly()
    expected.gradients.popitem()
    with pytest.raises(KeyError):
        judge(job_of({}), expected)


def test_targets_that_do_not_count() -> None:
    targets: Tensor = torch.tensor([[3, -100], [0, 1]])
    assert num_valid(targets) == 3
