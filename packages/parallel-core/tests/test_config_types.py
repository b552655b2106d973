"""Types of fields in words, and what fits them."""

from typing import Any, Literal

import pytest

from fivefold.parallel_core.config_types import checked, described, fields_of, is_table, options_of
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.sequence_split import ContextConfig


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (bool, "true or false"),
        (int | None, "int or none"),
        (Literal["a", 2], "one of 'a', 2"),
        (tuple[int, ...], "a list of int"),
        (tuple[int, str], "a list of 2: int, str"),
        (dict[str, float], "a table of float"),
        (ContextConfig, "a table with keys attention, split"),
    ],
)
def test_types_in_words(kind: Any, words: str) -> None:
    assert described(kind) == words


@pytest.mark.parametrize(
    ("value", "kind", "wanted"),
    [
        (3, float, 3.0),
        ([1, 2], tuple[int, ...], (1, 2)),
        (None, int | None, None),
        ({"split": "zigzag"}, ContextConfig, ContextConfig(split="zigzag")),
        ({"a": 1}, dict[str, float], {"a": 1.0}),
    ],
)
def test_what_fits(value: Any, kind: Any, wanted: Any) -> None:
    found = checked(value, kind, "here")
    assert found == wanted and type(found) is type(wanted)


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (True, int, r"here: found True \(bool\), expected int"),
        (None, int, "here: found none, expected int"),
        ([1, "2"], tuple[int, ...], r"here\[1\]: found '2' \(str\), expected int"),
        ({"a": "x"}, dict[str, int], r"here\.a: found 'x' \(str\), expected int"),
        ({"split": "no"}, ContextConfig, r"here\.split: .* one of 'contiguous', 'zigzag'"),
    ],
)
def test_what_does_not_fit(value: Any, kind: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked(value, kind, "here")


def test_tables_and_unions_are_told_apart() -> None:
    assert is_table(ContextConfig) and not is_table(dict)
    assert set(fields_of(ContextConfig)) == {"attention", "split"}
    assert options_of(int | None) == (int, type(None)) and options_of(int) == (int,)
