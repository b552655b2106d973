"""Spellings of a hybrid's layers."""

import pytest

from fivefold.hybrid_ssm.errors import HybridConfigError
from fivefold.hybrid_ssm.pattern import (
    check_pattern,
    parse_pattern,
    pattern_of_words,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("M-M*E", ("M-M*E", "")),
        ("M-|M*|E", ("M-M*E", "")),
        ("MEM*/*E", ("MEM*", "*E")),
        ("ME|M*/*E/*E", ("MEM*", "*E")),
    ],
)
def test_marks_of_megatron_are_no_layers(text: str, expected: tuple[str, str]) -> None:
    assert parse_pattern(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "pattern of the layers is empty"),
        ("MX-", r"layer 1 of pattern 'MX-' is 'X'; there are 'M' Mamba-2, '\*' attention"),
        ("M//*E", "pattern of the layers is empty"),
        ("M/*E/**", r"depths \*E, \*\*; they must be equal"),
    ],
)
def test_what_is_no_pattern_is_refused(text: str, message: str) -> None:
    with pytest.raises(HybridConfigError, match=message):
        parse_pattern(text)


def test_old_and_new_words_mean_the_same() -> None:
    old = ["mamba", "attention", "mlp", "moe"]
    new = ["linear_attention", "full_attention", "mlp", "moe"]
    assert pattern_of_words(old, "key") == pattern_of_words(new, "key") == "M*-E"


@pytest.mark.parametrize("words", ["mamba", ["mamba", "linear"], ["M"], [1], None])
def test_other_words_are_refused(words: object) -> None:
    with pytest.raises(HybridConfigError, match=r"^key "):
        pattern_of_words(words, "key")


def test_check_pattern_passes_every_kind() -> None:
    check_pattern("M*-E")
