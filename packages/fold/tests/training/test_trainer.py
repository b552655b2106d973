"""Steps equal plain torch, runs go on bit for bit, ranks change nothing, and problems are named."""

import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fivefold.fold.data.dataset import Chains
from fivefold.fold.losses.total import alphafold_loss
from fivefold.fold.training.config import RunConfig, load_run
from fivefold.fold.training.run import build_model, load_run_model, make_trainer, train_rank
from fivefold.fold.training.samples import seed_of
from fivefold.fold.training.scoring import placed
from fivefold.fold.training.trainer import FoldTrainer
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.topology import Topology
from fivefold.parallel_core.training.metrics import read_jsonl

Told = list[tuple[int, dict[str, float]]]


def trainer_of(config: RunConfig, folder: Path | None = None) -> tuple[FoldTrainer, Told]:
    """A trainer of one process, and the list of what it tells."""
    trainer, told = make_trainer(config, Topology.local(), folder), []
    trainer.report = lambda step, measured: told.append((step, _without_times(measured)))
    return trainer, told


def _without_times(measured: Mapping[str, float]) -> dict[str, float]:
    return {k: v for k, v in measured.items() if "seconds" not in k and "second" not in k}


def changed(config: RunConfig, **values: Any) -> RunConfig:
    return replace(config, training=replace(config.training, **values))


def values_of(trainer: FoldTrainer) -> dict[str, Tensor]:
    return {name: part.tensor.clone() for name, part in trainer.parts().items()}


def test_a_killed_run_goes_on_bit_for_bit(config: RunConfig, tmp_path: Path) -> None:
    whole, told = trainer_of(config)
    whole.fit()
    killed, before = trainer_of(config, tmp_path)
    killed.train_step(), killed.train_step()
    killed.save()
    killed.train_step()  # is lost with the process
    again, after = trainer_of(config, tmp_path)
    assert again.resume() == 2
    random = torch.get_rng_state()
    again.fit()
    assert before[:2] + after == told
    expected, found = values_of(whole), values_of(again)
    assert {name.split(".")[0] for name in expected} == {"model", "exp_avg", "exp_avg_sq", "ema"}
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not torch.equal(random, torch.get_rng_state())


def test_a_step_is_the_mean_of_clipped_samples(config: RunConfig) -> None:
    limit = 0.03
    config = changed(config, sample_gradient_clip=limit, ema_decay=0.9)
    trainer, told = trainer_of(config)
    model = build_model(config, Topology.local()).parts[0].train()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    norms = []
    for sample in trainer.samples.of(0):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(seed_of(config.training.seed, sample.number))
        cycles = [placed(each, torch.device("cpu"), torch.float64) for each in sample.features]
        loss, _ = alphafold_loss(model(cycles), cycles[-1], config.loss)
        (loss * math.sqrt(float(cycles[-1]["seq_mask"].sum()))).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        norms.append(float(torch.cat([g.flatten() for g in grads.values()]).norm()))
        for name, grad in grads.items():
            sums[name] += grad * min(1.0, limit / norms[-1]) / 2
    trainer.train_step()
    measured = told[0][1]
    assert measured["sample_norm"] == pytest.approx(sum(norms) / 2, rel=1e-9)
    assert measured["clipped"] == sum(norm > limit for norm in norms) / 2 > 0
    rate, eps = measured["learning_rate"], config.training.optimizer.eps
    for name, piece in trainer._parameters.items():
        # Adam's first step, whose moments are the gradient itself.
        expected = start[name] - rate * sums[name] / (sums[name].abs() + eps)
        torch.testing.assert_close(piece.detach(), expected, rtol=1e-9, atol=1e-12)
        average = trainer.parts()[f"ema.{name}"].tensor
        torch.testing.assert_close(average, 0.9 * start[name] + 0.1 * expected)


def _two_steps(config: RunConfig) -> tuple[dict[str, Tensor], float | None]:
    import torch.distributed as dist

    trainer = make_trainer(config, Topology(Layout(dist.get_world_size())), None)
    trainer.train_step(), trainer.train_step()
    return values_of(trainer), trainer.evaluate()


def test_two_ranks_train_as_one(config: RunConfig) -> None:
    trainer, _ = trainer_of(config)
    trainer.train_step(), trainer.train_step()
    expected, loss = values_of(trainer), trainer.evaluate()
    for found, score in launch(_two_steps, 2, config):
        assert score == pytest.approx(loss, abs=1e-12)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


def _dtypes(config: RunConfig) -> tuple[set[torch.dtype], set[torch.dtype], set[torch.dtype]]:
    trainer = make_trainer(config, Topology(Layout(1)), None)
    trainer.train_step()
    exact, rounded = set(), set()
    for name, parameter in trainer.network.named_parameters():
        (exact if name.startswith(("structure_module", "heads")) else rounded).add(parameter.dtype)
    return exact, rounded, {value.dtype for value in values_of(trainer).values()}


def test_16_bits_are_kept_from_structure_and_optimizer(plain: dict[str, Any]) -> None:
    precision = {"parameters": "float32", "compute": "bfloat16"}
    config = load_run({**plain, "training": {**plain["training"], "precision": precision}})
    ((exact, rounded, stored),) = launch(_dtypes, 1, config)
    assert (exact, rounded, stored) == ({torch.float32}, {torch.bfloat16}, {torch.float32})


def test_training_stops_at_its_target_and_leaves_a_network(
    config: RunConfig, tmp_path: Path
) -> None:
    config = changed(config, evaluate_every=2, ema_decay=None)
    config = replace(config, evaluation=replace(config.evaluation, target=1e-6))
    outcome = train_rank(config, tmp_path)
    assert (outcome.step, outcome.finished) == (2, True)
    records = read_jsonl(tmp_path / "metrics.jsonl")
    assert records[-1]["heldout_lddt_ca"] == pytest.approx(1 - outcome.heldout_loss)
    assert train_rank(config, tmp_path).step == 2
    model, step = load_run_model(tmp_path)
    assert step == 2 and model.config == config.model


def test_another_network_cannot_go_on(config: RunConfig, tmp_path: Path) -> None:
    trainer, _ = trainer_of(config, tmp_path)
    trainer.save()
    other = replace(config, model=replace(config.model, max_relative_position=5))
    with pytest.raises(ConfigError, match="max_relative_position"):
        trainer_of(other, tmp_path)[0].resume()


def test_a_chain_that_cannot_be_read_is_named_and_the_run_goes_on(
    plain: dict[str, Any], prepared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(prepared, tmp_path / "damaged"))
    shard = next(r["shard"] for r in Chains(folder).records if r["name"] == "1ubq_A")
    (folder / shard).write_bytes(b"broken")
    config = load_run({**plain, "data": {**plain["data"], "prepared": str(folder)}})
    trainer, told = trainer_of(config)
    with caplog.at_level(logging.WARNING):
        trainer.fit()
    assert trainer.step == 4
    assert "1ubq_A cannot be read" in caplog.text
    assert sum(measured.get("unusable_chains", 0) for _, measured in told) > 0


def _shared_steps(config: RunConfig) -> tuple[dict[str, Tensor], float | None, Told]:
    import torch.distributed as dist

    topology, told = Topology(config.training.layout(dist.get_world_size())), []
    trainer = make_trainer(config, topology, None)
    trainer.report = lambda step, measured: told.append((step, _without_times(measured)))
    trainer.train_step(), trainer.train_step()
    return values_of(trainer), trainer.evaluate(), told


def test_ranks_that_share_samples_train_as_one(config: RunConfig) -> None:
    config = changed(config, sample_gradient_clip=0.03)
    trainer, told = trainer_of(config)
    trainer.train_step(), trainer.train_step()
    expected, loss = values_of(trainer), trainer.evaluate()
    assert told[0][1]["clipped"] > 0
    ranks = launch(_shared_steps, 4, changed(config, dap=2), timeout=300)
    for found, score, _ in ranks:
        assert score == pytest.approx(loss, abs=1e-12)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
    assert [step for step, _ in ranks[0][2]] == [step for step, _ in told]
    for (_, measured), (_, of_one) in zip(ranks[0][2], told, strict=True):
        assert measured == pytest.approx(of_one, rel=1e-9, abs=1e-12)


def test_waiting_for_samples_is_a_part_of_the_step(config: RunConfig) -> None:
    trainer, measured = make_trainer(config, Topology.local(), None), []
    trainer.report = lambda step, values: measured.append(values)
    trainer.train_step()
    assert 0 < measured[0]["waiting_seconds"] < measured[0]["seconds"]
