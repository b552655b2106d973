"""Files of runs: presets, what a file changes, and what cannot be."""

from pathlib import Path
from typing import Any

import pytest

from fivefold.fold.presets import preset
from fivefold.fold.training.config import RunConfig, load_run
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.layout import Layout

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.toml"))
RUN = {
    "preset": "model_3",
    "data": {"prepared": "p"},
    "training": {"steps": 5, "global_batch_size": 4, "schedule": {"learning_rate": 1e-3}},
}


def test_a_file_changes_single_values_of_a_preset() -> None:
    config = load_run({**RUN, "model": {"evoformer": {"num_blocks": 3}}}, {"loss.plddt": "0.5"})
    known = preset("model_3")
    assert config.model.evoformer.num_blocks == 3
    assert config.model.evoformer.c_outer == known.model.evoformer.c_outer
    assert config.loss.plddt == 0.5 and config.loss.chi == known.loss.chi
    schedule = config.training.schedule
    assert [schedule.rate(step) for step in range(5)] == [1e-3] * 5
    assert RunConfig.from_dict(config.to_dict()) == config
    assert load_run(RUN, {"preset": "model_4"}).features.max_extra_msa == 5120


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_runs(path: Path) -> None:
    assert load_run(path).training.steps > 0


def test_the_defaults_are_alphafolds() -> None:
    training = load_run(RUN).training
    assert training.sample_gradient_clip == 0.1 and training.gradient_clip is None
    assert training.optimizer.betas == (0.9, 0.999) and training.optimizer.eps == 1e-6
    assert training.optimizer.weight_decay == 0
    assert [training.decay(step) for step in (0, 10**6)] == [0.999, 0.999]


def test_a_warm_average_follows_faster_at_first() -> None:
    training = load_run(RUN, {"training.ema_warmup": "true"}).training
    assert training.decay(1) == 2 / 11 and training.decay(10**6) == 0.999


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("preset", "model_9", "no preset 'model_9'"),
        ("features", {"max_templates": 2}, "takes no templates"),
        ("data", {"prepared": "p", "heldout_fraction": 1.0}, "below 1"),
        ("data", {"prepared": "p", "chains": ["a"], "heldout": ["a"]}, "both in chains"),
        ("data", {"prepared": "p", "num_workers": -1}, "at least 0"),
        ("evaluation", {"target": 1.5}, "at most 1"),
        ("evaluation", {"max_length": 0}, "at least 1"),
        ("training", {**RUN["training"], "sample_gradient_clip": 0.0}, "positive norm"),
        ("training", {**RUN["training"], "ema_decay": 1.0}, "below 1"),
        ("training", {**RUN["training"], "data_parallel": {"form": "zero3"}}, "replicate, zero1"),
        ("training", {**RUN["training"], "speed": 1}, "unknown key"),
        ("training", {**RUN["training"], "dap": 0}, "dap=0"),
    ],
)
def test_what_cannot_be_is_said(section: str, values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_run({**RUN, section: values})


def test_a_batch_divides_over_ranks() -> None:
    training = load_run(RUN).training
    assert training.samples_per_rank(Layout(2)) == 2
    with pytest.raises(ConfigError, match="multiple of 3"):
        training.samples_per_rank(Layout(3))


def test_neighbours_share_samples() -> None:
    training = load_run(RUN, {"training.dap": "2"}).training
    layout = training.layout(4)
    assert (layout.tp, layout.dp, layout.groups("tp")) == (2, 2, [[0, 1], [2, 3]])
    assert training.samples_per_rank(layout) == 2
    with pytest.raises(ConfigError, match=r"dap=2 does not divide 3 ranks; choose one of 1, 3"):
        training.layout(3)
