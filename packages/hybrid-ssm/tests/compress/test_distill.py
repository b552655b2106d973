"""Distillation over ranks, kept logits, and pairs that do not fit."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fivefold.hybrid_ssm import HybridForCausalLM
from fivefold.hybrid_ssm.compress.config import DistillConfig
from fivefold.hybrid_ssm.compress.distill import Lesson, distill_rank, make_trainer
from fivefold.hybrid_ssm.compress.prune import random_scores, whole
from fivefold.hybrid_ssm.compress.student import write_student
from fivefold.hybrid_ssm.errors import HybridConfigError
from fivefold.hybrid_ssm.export import load_run_model
from fivefold.hybrid_ssm.fp8 import FP8Config
from fivefold.parallel_core import config as configuration
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.topology import Topology
from fivefold.parallel_core.training.metrics import read_jsonl
from fivefold.parallel_core.training.report import METRICS
from fivefold.parallel_core.training.run import DataConfig, LayoutConfig

STEPS = 3
DISTILL = DistillConfig(
    global_batch_size=4,
    microbatch_size=2,
    sequence_length=16,
    checkpoint_every=1,
    evaluate_every=None,
    compute="float64",
    learning_rate=1e-2,
    temperature=1.5,
)


@pytest.fixture(autouse=True)
def _nan_in_memory_that_nobody_wrote() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def lesson(
    make_model: Callable[..., HybridForCausalLM],
    save: Callable[..., Path],
    text: Path,
    tmp_path: Path,
) -> Lesson:
    """A parent of another depth and width than its child."""
    model = make_model()
    parent = save(model)
    few = configuration.replace(whole(model.config), layers=(0, 1, 2, 4, 5, 6), width=16, experts=2)
    write_student(parent, few, random_scores(model.config, 0), tmp_path / "student")
    data = DataConfig(
        source=str(text),
        cache=str(tmp_path / "tokens"),
        tokenizer=str(parent),
        heldout_fraction=0.3,
    )
    return Lesson(parent, tmp_path / "student", tmp_path / "run", STEPS, DISTILL, data, None, 4)


def learnt(lesson: Lesson, world_size: int = 1) -> dict[str, Tensor]:
    outcome = launch(distill_rank, world_size, lesson, world_size, timeout=200)[0]
    assert outcome.finished and outcome.step == STEPS
    return load_run_model(lesson.run)[0].state_dict()


def losses(lesson: Lesson) -> list[float]:
    records = read_jsonl(lesson.run / METRICS)
    return [record[key] for key in ("loss", "heldout_loss") for record in records if key in record]


def test_loss_is_the_divergence_of_the_two_models(lesson: Lesson) -> None:
    learnt(lesson)
    trainer = make_trainer(replace(lesson, run=lesson.run / "beside"), Topology.local())
    ids, _, starts = trainer.batches.batch(0)
    teacher, student = (
        HybridForCausalLM.from_pretrained(folder, dtype=torch.float64)
        for folder in (lesson.teacher, lesson.student)
    )
    with torch.no_grad():
        log_p, log_q = (
            (model(ids, document_starts=starts) / 1.5).log_softmax(-1)
            for model in (teacher, student)
        )
    expected = 1.5**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert losses(lesson)[0] == pytest.approx(float(expected), rel=1e-9)
    assert losses(lesson)[2] < losses(lesson)[0]


LAYOUTS: list[tuple[int, dict[str, int]]] = [
    (2, {"tp": 2}),
    (4, {"tp": 2, "cp": 2, "ep": 2}),
]


@pytest.mark.parametrize(("world", "degrees"), LAYOUTS, ids=str)
def test_every_layout_teaches_the_same(world: int, degrees: dict[str, int], lesson: Lesson) -> None:
    expected = learnt(lesson)
    distill = configuration.replace(DISTILL, layout=LayoutConfig(**degrees))
    other = replace(lesson, run=lesson.run / "other", config=distill)
    found = learnt(other, world)
    assert losses(other) == pytest.approx(losses(lesson), rel=1e-9)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9, msg=name)


def test_a_student_may_learn_in_fp8(lesson: Lesson) -> None:
    learnt(lesson)
    distill = configuration.replace(DISTILL, fp8=FP8Config(first=1, last=2))
    learnt(replace(lesson, run=lesson.run / "fp8", config=distill))
    distance = abs(losses(lesson)[0] / losses(replace(lesson, run=lesson.run / "fp8"))[0] - 1)
    assert 1e-6 < distance < 0.1


def test_kept_logits_teach_the_same(lesson: Lesson, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = learnt(lesson)
    keeping = replace(lesson, run=lesson.run / "keeping", cache=lesson.run / "logits")
    learnt(keeping)
    assert losses(lesson) == losses(keeping)

    # The parent is not even loaded where all of its logits are there.
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(HybridForCausalLM, "from_pretrained", never)
    again = learnt(replace(keeping, run=lesson.run / "again"))
    assert all(torch.equal(again[name], value) for name, value in expected.items())


def test_pairs_that_do_not_fit(
    lesson: Lesson, make_model: Callable[..., HybridForCausalLM], save: Callable[..., Path]
) -> None:
    for changes, text in (
        (
            {"vocab_size": 300},
            r"vocab_size=257 and the student .* has vocab_size=300; .* one t",
        ),
        ({"eos_token_id": 3}, r"eos_token_id=256 and the student .* has eos_token_id=3"),
    ):
        other = save(make_model(**changes), "other")
        with pytest.raises(HybridConfigError, match=text):
            make_trainer(replace(lesson, student=other), Topology.local())
    path = lesson.student / "tokenizer.json"
    path.write_text(path.read_text().replace('"Ġ":', '"Ġ" :'))
    with pytest.raises(HybridConfigError, match=r"the tokenizer of .*student .*must share one"):
        make_trainer(lesson, Topology.local())


def test_another_lesson_in_the_same_folder(lesson: Lesson) -> None:
    learnt(lesson)
    hotter = replace(lesson, config=configuration.replace(DISTILL, temperature=9.0))
    with pytest.raises(ConfigError, match=r"temperature=1\.5.*temperature=9\.0"):
        make_trainer(hotter, Topology.local()).resume()
