"""What every run of a language model is told."""

from typing import Any

import pytest

from fivefold.parallel_core.errors import ConfigError, LayoutError
from fivefold.parallel_core.training.run import (
    DataConfig,
    LayoutConfig,
    end_schedule_with_run,
    table_of,
)


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
