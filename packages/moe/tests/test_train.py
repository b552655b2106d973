"""Runs: their configuration, and what they do and write."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fivefold.moe.errors import MoEConfigError
from fivefold.moe.export import read_run
from fivefold.moe.train import RunConfig, check, load_run, make_trainer
from fivefold.parallel_core.checkpoint import Checkpoints
from fivefold.parallel_core.config import load_toml
from fivefold.parallel_core.documents import starts_after
from fivefold.parallel_core.errors import ConfigError, DataError, LayoutError
from fivefold.parallel_core.topology import Topology
from fivefold.parallel_core.training.tokenizer import ByteTokenizer

from .runs import ONE_RANK, records

SMALLEST: Mapping[str, Any] = {
    "model": {
        "hidden_size": 8,
        "num_layers": 2,
        "num_attention_heads": 2,
        "expert_intermediate_size": 8,
        "num_experts": 4,
        "num_experts_per_token": 2,
    },
    "training": {
        "steps": 5,
        "global_batch_size": 4,
        "microbatch_size": 1,
        "sequence_length": 8,
        "schedule": {"learning_rate": 0.1},
    },
}


# ---- configuration -------------------------------------------------------------------------


def test_what_a_file_leaves_out() -> None:
    config = load_run(SMALLEST)
    assert (config.model.vocab_size, config.model.eos_token_id) == (257, 256)
    assert config.training.schedule.total_steps == 5
    assert config.layout.layout(8).dp == 8
    assert config.data.source == "stdlib"
    assert RunConfig.from_dict(config.to_dict()) == config


def test_overrides() -> None:
    changes = {
        "training.steps": "9",
        "layout.tp": "2",
        "data.source": "here",
        "model.norm_eps": "0.1",
    }
    config = load_run(SMALLEST, changes)
    assert config.training.steps == config.training.schedule.total_steps == 9
    assert (config.layout.tp, config.data.source, config.model.norm_eps) == (2, "here", 0.1)
    asked = {"training.steps": "9", "training.schedule.total_steps": "20"}
    assert load_run(SMALLEST, asked).training.schedule.total_steps == 20
    training = SMALLEST["training"]
    schedule = {"learning_rate": 0.1, "total_steps": 7}
    written = load_run({**SMALLEST, "training": {**training, "schedule": schedule}}, changes)
    assert written.training.schedule.total_steps == 7
    assert load_run(SMALLEST, {"model.eos_token_id": "10"}).model.eos_token_id == 10


def test_a_file_is_read(run_file: Path) -> None:
    assert load_run(run_file) == load_run(load_toml(run_file))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"speed": {}}, ConfigError, "unknown key 'speed'"),
        (
            {"model": {"hiden_size": 8}},
            ConfigError,
            "'model.hiden_size'; did you mean 'hidden_size'",
        ),
        ({"model": 3}, ConfigError, r"model: found 3, expected a table: \[model\]"),
        ({"training": []}, ConfigError, r"training: found \[\], expected a table"),
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
        ({"layout.ep": "3"}, LayoutError, "8 is not a multiple of etp.ep.pp = 1.3.1 = 3"),
        ({"layout.ep": "8"}, MoEConfigError, "num_experts=4 cannot be split over ep=8"),
        (
            {"training.global_batch_size": "12"},
            ConfigError,
            r"global_batch_size=12 is not a multiple of dp \* microbatch_size = 8 \* 1 = 8",
        ),
        (
            {"layout.pp": "4"},
            ConfigError,
            "1F1B over 4 pipeline ranks needs at least 4 microbatches in a step, found 2",
        ),
        (
            {
                "layout.ep": "4",
                "training.global_batch_size": "8",
                "training.data_parallel.expert_shard_size": "4",
            },
            ConfigError,
            "expert_shard_size=4 does not divide the 2 ranks of edp; legal: 1, 2",
        ),
        (
            {"layout.pp": "4", "training.global_batch_size": "8"},
            MoEConfigError,
            "num_layers=2 cannot fill 4 pipeline stages",
        ),
        (
            {"model.max_position_embeddings": "3"},
            ConfigError,
            "is more than model.max_position_embeddings=3, the longest",
        ),
    ],
)
def test_check_names_what_does_not_fit(
    overrides: dict[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        check(load_run(SMALLEST, overrides), 8)


def test_check_gives_the_layout() -> None:
    layout = check(load_run(SMALLEST, {"layout.tp": "2", "layout.ep": "4"}), 8)
    assert (layout.world_size, layout.tp, layout.dp, layout.ep, layout.edp) == (8, 2, 4, 4, 2)


# ---- what a run does -----------------------------------------------------------------------


def test_heldout_text_is_never_trained_on(run_file: Path) -> None:
    config = load_run(run_file, ONE_RANK)
    trainer = make_trainer(config, Topology.local(), None)
    num_batches = -(-trainer.batches.num_windows // config.training.global_batch_size)
    epoch = torch.cat([trainer.batches.batch(step)[0] for step in range(num_batches)])
    heldout = text_of(config.data.prepare(ByteTokenizer()).tokens("heldout")[:])
    trained = set(re.findall(r"mark\d+", " ".join(map(text_of, epoch))))
    assert len(trained) >= 10  # some marks lie across two windows
    assert re.findall(r"mark\d+", heldout)
    assert not trained & set(re.findall(r"mark\d+", heldout))
    windows = [row for inputs, _ in trainer.heldout for row in inputs]
    assert len(windows) == 8
    assert all(text_of(window) in heldout for window in windows)


def text_of(ids: Any) -> str:
    return ByteTokenizer().decode(ids)


def test_what_a_run_writes(run_file: Path, finished_run: Path) -> None:
    config = load_run(run_file)
    assert read_run(finished_run) == config
    assert Checkpoints(finished_run / "checkpoints").steps() == [3, 6]
    assert (finished_run / "loss.png").stat().st_size > 1000
    assert (finished_run / "load.png").stat().st_size > 1000
    steps = [record for record in records(finished_run) if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    tokens = 8 * 16
    for record in steps:
        assert all(math.isfinite(value) for value in record.values())
        assert record["learning_rate"] == 1e-2
        assert record["tokens_per_second"] == pytest.approx(tokens / record["seconds"])
        assert 1 <= record["load_max_over_mean"] <= record["load_max_over_mean_worst"] <= 4
        for layer in ("layer0", "layer1"):
            assert record[f"{layer}_load_mean"] == tokens * 2 / 8
            low, high = record[f"{layer}_load_min"], record[f"{layer}_load_max"]
            assert low <= record[f"{layer}_load_p95"] <= high
            # 4 bytes of 16 values; on 4 ranks that share the experts, and no others
            assert record[f"{layer}_rank_bytes_mean"] == tokens * 2 * 64 / 4
        assert 0.01 < record["aux_loss"] < 0.05
        assert 0 < record["z_loss"] < 1
    assert steps[0]["loss"] == pytest.approx(math.log(257), rel=0.05)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.2


def test_bits_are_of_bytes(run_file: Path, finished_run: Path) -> None:
    dataset = load_run(run_file).data.prepare(ByteTokenizer())
    for record in records(finished_run):
        for split, loss, bits in (
            ("train", "loss", "bits_per_byte"),
            ("heldout", "heldout_loss", "heldout_bits_per_byte"),
        ):
            if loss in record:
                # An end-of-text token is a token and no byte.
                per_byte = dataset.num_tokens(split) / dataset.num_bytes[split]
                assert 1 < per_byte < 1.02
                assert record[bits] == pytest.approx(record[loss] / math.log(2) * per_byte)
    heldout = [record for record in records(finished_run) if "heldout_loss" in record]
    assert [record["step"] for record in heldout] == [2, 4, 6]


def test_documents_are_kept_apart_on_request(run_file: Path) -> None:
    together, apart = (
        make_trainer(load_run(run_file, {**ONE_RANK, **changes}), Topology.local(), None)
        for changes in ({}, {"data.separate_documents": "true"})
    )
    assert together.identity["separate_documents"] is None
    assert apart.identity["separate_documents"] is True
    inputs, _, starts = apart.batches.batch(0)
    assert torch.equal(inputs, together.batches.batch(0)[0])
    assert torch.equal(starts, starts_after(inputs, ByteTokenizer.end_of_text_id))
    bordered = next(step for step in range(99) if apart.batches.batch(step)[2].gt(0).any())
    for trainer in (together, apart):
        trainer.step = bordered
        trainer.report = lambda step, figures, seen=trainer: setattr(seen, "figures", figures)
        trainer.train_step()
    assert apart.figures["loss"] != together.figures["loss"]
    heldout = [trainer.evaluate() for trainer in (together, apart)]
    assert heldout[0] != heldout[1]
