"""What every run of a language model is told."""

from pathlib import Path
from typing import Any

import pytest

from fivefold.parallel_core.errors import ConfigError, DataError, LayoutError
from fivefold.parallel_core.training.run import (
    DataConfig,
    LayoutConfig,
    end_schedule_with_run,
    load_text_run,
    table_of,
)

from .text_runs import MoreData, ToyRun, written


def test_layouts_have_their_degrees() -> None:
    layout = LayoutConfig(tp=2, pp=2).layout(8)
    assert (layout.tp, layout.pp, layout.dp) == (2, 2, 2)
    with pytest.raises(LayoutError):
        LayoutConfig(tp=3).layout(8)


def test_tables_are_tables() -> None:
    assert table_of({"a": {"b": 1}}, "a") == {"b": 1}
    assert table_of({}, "a") == {}
    with pytest.raises(ConfigError, match=r"a: found 3, expected a table: \[a\]"):
        table_of({"a": 3}, "a")


def test_the_schedule_ends_with_the_run() -> None:
    raw: dict[str, Any] = {"training": {"steps": 5, "schedule": {"learning_rate": 1.0}}}
    overrides = {"training.steps": "9"}
    end_schedule_with_run(raw, overrides)
    assert raw["training"]["schedule"] == {"learning_rate": 1.0, "total_steps": 5}
    assert overrides["training.schedule.total_steps"] == "9"
    said: dict[str, Any] = {"training": {"steps": 5, "schedule": {"total_steps": 7}}}
    end_schedule_with_run(said, overrides)
    assert said["training"]["schedule"] == {"total_steps": 7}


def test_text_is_prepared_once(tmp_path: Any) -> None:
    (tmp_path / "a.txt").write_text("some text " * 50)
    (tmp_path / "b.txt").write_text("other text " * 50)
    config = DataConfig(source=str(tmp_path), cache=str(tmp_path / "cache"), heldout_fraction=0.5)
    tokenizer = config.load_tokenizer()
    first, second = config.prepare(tokenizer), config.prepare(tokenizer)
    assert first.fingerprint == second.fingerprint
    assert first.num_tokens("train") + first.num_tokens("heldout") == 1050 + 2


def test_what_a_file_leaves_out_is_the_tokenizer_s(tmp_path: Path) -> None:
    raw = written(tmp_path)
    run = load_text_run(ToyRun, raw)
    assert (run.model.vocab_size, run.model.eos_token_id) == (257, 256)
    assert run.training.schedule.total_steps == 4
    assert isinstance(run.data, MoreData)
    assert ToyRun.from_dict(run.to_dict()) == run
    assert load_text_run(ToyRun, {**raw, "model": {"eos_token_id": 3}}).model.eos_token_id == 3
    changes = {"data.separate_documents": "true", "training.steps": "9", "model.vocab_size": "300"}
    changed = load_text_run(ToyRun, raw, changes)
    assert changed.data.separate_documents and changed.model.vocab_size == 300
    assert changed.training.steps == changed.training.schedule.total_steps == 9


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"speed": {}}, ConfigError, "unknown key 'speed'"),
        ({"model": 3}, ConfigError, r"model: found 3, expected a table: \[model\]"),
        ({"data": {"sauce": "x"}}, ConfigError, "'data.sauce'; did you mean 'source'"),
        ({"data": {"tokenizer": "nothing.json"}}, DataError, "no tokenizer at nothing.json"),
        ({"model": {"vocab_size": 256}}, DataError, "257 ids, the model's vocabulary 256"),
    ],
)
def test_a_file_that_is_wrong(
    changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        load_text_run(ToyRun, {**written(tmp_path), **changes})
