"""Runs: their configuration, and what they do and write."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fivefold.hybrid_ssm import HybridForCausalLM
from fivefold.hybrid_ssm.errors import HybridConfigError
from fivefold.hybrid_ssm.export import read_run
from fivefold.hybrid_ssm.train import RunConfig, check, initialise, load_run, make_trainer
from fivefold.parallel_core.config import load_toml
from fivefold.parallel_core.errors import ConfigError, DataError, LayoutError
from fivefold.parallel_core.parameters import ParameterTable
from fivefold.parallel_core.topology import Topology
from fivefold.parallel_core.training.optimizer import decays

from .conftest import tiny_config
from .runs import ONE_RANK, TWO_STAGES, losses, records

SMALLEST: dict[str, Any] = {
    "model": {"hidden_size": 8, "pattern": "M-", "num_mamba_heads": 2, "mamba_head_dim": 8}
    | {"state_size": 4, "num_groups": 1, "intermediate_size": 16},
    "training": {
        "steps": 5,
        "global_batch_size": 4,
        "microbatch_size": 1,
        "sequence_length": 8,
        "schedule": {"learning_rate": 0.1},
    },
}


def test_what_a_file_leaves_out(run_file: Path) -> None:
    config = load_run(SMALLEST)
    assert (config.model.vocab_size, config.model.eos_token_id) == (257, 256)
    assert config.training.schedule.total_steps == 5
    assert (config.layout.layout(8).dp, config.data.source, config.packed) == (8, "stdlib", True)
    assert RunConfig.from_dict(config.to_dict()) == config
    assert load_run(run_file) == load_run(load_toml(run_file))


def test_overrides() -> None:
    changes = {"training.steps": "9", "layout.tp": "2", "model.norm_eps": "0.1", "packed": "false"}
    config = load_run(SMALLEST, changes)
    assert config.training.steps == config.training.schedule.total_steps == 9
    assert (config.layout.tp, config.packed, config.model.norm_eps) == (2, False, 0.1)
    asked = {"training.steps": "9", "training.schedule.total_steps": "20"}
    assert load_run(SMALLEST, asked).training.schedule.total_steps == 20


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"speed": {}}, ConfigError, "unknown key 'speed'"),
        ({"model": {"patern": "M"}}, ConfigError, "'model.patern'; did you mean 'pattern'"),
        ({"model": 3}, ConfigError, r"model: found 3, expected a table: \[model\]"),
        ({"training": {"steps": 1, "schedule": 2}}, ConfigError, "schedule: found 2, expected"),
        ({"data": {"tokenizer": "nothing.json"}}, DataError, "no tokenizer at nothing.json"),
        (
            {"model": {**SMALLEST["model"], "vocab_size": 256}},
            DataError,
            "the tokenizer has 257 ids, the model's vocabulary 256: set .* to 257 or more",
        ),
    ],
)
def test_a_file_that_is_wrong(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_run({**SMALLEST, **changes})


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"layout.pp": "3"}, LayoutError, "8 is not a multiple of"),
        ({"layout.tp": "4"}, HybridConfigError, "num_mamba_heads=2 cannot be split over tp=4"),
        (
            {"fp8.first": "1", "training.global_batch_size": "8"},
            HybridConfigError,
            "first=1 and last=4 leave none of the 2 layers",
        ),
        ({"training.global_batch_size": "12"}, ConfigError, "global_batch_size=12 is not a mult"),
        ({"layout.pp": "4", "training.global_batch_size": "8"}, HybridConfigError, "2 layers of"),
        (
            {"training.recompute": "experts", "training.global_batch_size": "8"},
            ConfigError,
            "no region 'experts'",
        ),
    ],
)
def test_check_names_what_does_not_fit(
    overrides: dict[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        check(load_run(SMALLEST, overrides), 8)


def test_first_values_do_not_depend_on_who_holds_them() -> None:
    config = tiny_config(decay_range=(2.0, 4.0), time_step_min=0.01, time_step_max=0.5)
    model = HybridForCausalLM(config)
    initialise(ParameterTable.of(model).pieces(model), config, 5)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    initialise(ParameterTable.of(model).pieces(model), config, 5)
    assert all(torch.equal(p, first[name]) for name, p in model.named_parameters())
    for name, values in first.items():
        if name.endswith("A_log"):
            assert 2.0 <= values.exp().min() < values.exp().max() <= 4.0
        elif name.endswith("dt_bias"):
            steps = torch.nn.functional.softplus(values)
            assert 0.0099 <= steps.min() < steps.max() <= 0.501
    assert not torch.equal(first["layers.0.mixer.heads.A_log"], first["layers.2.mixer.heads.A_log"])


def test_decays_steps_and_norms_have_no_weight_decay() -> None:
    model = HybridForCausalLM(tiny_config(use_bias=True))
    pieces = ParameterTable.of(model).pieces(model)
    free = {piece.name.rpartition(".")[2] for piece in pieces if not decays(piece)}
    assert free == {"A_log", "D", "dt_bias", "bias", "weight"}
    free_weights = [p.name for p in pieces if not decays(p) and p.name.endswith("weight")]
    assert all("norm" in name for name in free_weights)
    assert all(not decays(p) for p in pieces if "norm" in p.name)


def test_a_run_learns_and_says_so(run_file: Path, finished_run: Path) -> None:
    assert read_run(finished_run) == load_run(run_file)
    steps = [record for record in records(finished_run) if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    for record in steps:
        assert all(math.isfinite(value) for value in record.values())
        assert 1 <= record["load_max_over_mean"] <= record["load_max_over_mean_worst"] <= 4
        assert 0 < record["aux_loss"] < 0.03 and 0 < record["z_loss"] < 1
    assert steps[0]["loss"] == pytest.approx(math.log(257), rel=0.05)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.2
    heldout = [record for record in records(finished_run) if "heldout_loss" in record]
    assert [record["step"] for record in heldout] == [2, 4, 6]
    assert all(record["heldout_bits_per_byte"] > 0 for record in heldout)


@pytest.mark.parametrize("overrides", [ONE_RANK, ONE_RANK | {"training.recompute": "full"}])
def test_one_rank_trains_the_same(
    overrides: dict[str, str], run_file: Path, finished_run: Path
) -> None:
    trainer = make_trainer(load_run(run_file, overrides), Topology.local(), None)
    measured: dict[int, float] = {}
    trainer.report = lambda step, found: measured.update(
        {step: found["loss"]} if "loss" in found else {}
    )
    trainer.fit()
    expected = {step: loss for (step, name), loss in losses(finished_run).items() if name == "loss"}
    assert measured == pytest.approx(expected, abs=2e-5)


def test_packed_documents_are_told_apart(run_file: Path) -> None:
    """A run that packs computes another loss than one that runs documents together."""
    first = []
    for packed in ("true", "false"):
        config = load_run(run_file, ONE_RANK | {"packed": packed})
        trainer = make_trainer(config, Topology.local(), None)
        trainer.report = lambda step, found: first.append(found["loss"])
        trainer.train_step()
        inputs, _, *starts = trainer.batches.batch(0)
        assert len(starts) == (packed == "true")
    assert 1e-7 < abs(first[0] - first[1]) < 0.1
    assert (inputs == 256).any()


def test_layers_in_fp8(run_file: Path) -> None:
    """All but the first and the last compute in FP8, and the loss hardly differs."""
    first = []
    for overrides in ({}, {"fp8.first": "1", "fp8.last": "1", "fp8.gradients": "e4m3"}):
        trainer = make_trainer(load_run(run_file, ONE_RANK | overrides), Topology.local(), None)
        trainer.report = lambda step, found: first.append(found["loss"])
        trainer.train_step()
    assert 1e-6 < abs(first[0] - first[1]) < 0.05
    (part,) = trainer.model.parts
    changed = {name for name, module in part.named_modules() if type(module).__name__[:3] == "FP8"}
    assert {name.split(".")[1] for name in changed} == {"1", "2", "3"}
    assert "layers.2.mixer.experts" in changed


def test_stages_share_nothing_that_they_should_not(run_file: Path) -> None:
    layout = check(load_run(run_file, TWO_STAGES), 2)
    assert (layout.pp, layout.dp) == (2, 1)
