"""Everything that can happen while blocks exchange states, in small: see protocol.py."""

from typing import Any

import pytest

from .protocol import Protocol, search

SIZES = [
    {"num_blocks": 2, "num_words": 2, "num_steps": 5},
    {"num_blocks": 3, "num_words": 1, "num_steps": 4},
    {"num_blocks": 2, "num_words": 3, "num_steps": 1},
    {"num_blocks": 1, "num_words": 2, "num_steps": 3},
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_no_order_of_events_stops_it_or_reads_a_wrong_word(sizes: dict[str, int]) -> None:
    verdict = search(Protocol(**sizes))
    assert verdict.fault is None
    assert verdict.num_states > 2 ** (sizes["num_blocks"] * sizes["num_words"])


@pytest.mark.parametrize("step", [1, 2, 3])
def test_words_that_look_empty_are_changed_before_they_are_published(step: int) -> None:
    sizes = {"num_blocks": 2, "num_words": 2, "num_steps": 3}
    changed = Protocol(**sizes, collisions=frozenset({step}))
    assert search(changed).fault is None
    as_they_are = Protocol(**sizes, collisions=frozenset({step}), canonical=False)
    # Nobody reads the last step's words.
    assert search(as_they_are).fault == ("deadlock" if step < 3 else None)


MUTANTS: dict[str, tuple[dict[str, Any], str]] = {
    "readers do not wait": ({"waits": False}, "step 1 read an empty word"),
    "one of two words is looked at": ({"looked_at": 1}, "read an empty word"),
    "slots keep what was in them": ({"fills_first": False}, "step 1 read a word of step 100"),
    "a ring of two slots": ({"num_slots": 2}, "step 2 read a word of step 0"),
    "a ring of three slots": ({"num_slots": 3, "num_steps": 5}, "step 3 read a word of step 0"),
    "a ring of three that is cleared, without a fence": (
        {"num_slots": 3, "num_steps": 5, "cleared": True},
        "step 3 read a word of step 0",
    ),
    "a ring of four that is cleared, without a fence": (
        {"num_slots": 4, "num_steps": 6, "cleared": True},
        "step 4 read a word of step 0",
    ),
    "one slot, even with tags": ({"num_slots": 1, "tagged": True}, "deadlock"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_protocol_is_found_out(name: str) -> None:
    changes, fault = MUTANTS[name]
    verdict = search(Protocol(**{"num_blocks": 2, **changes}))
    assert verdict.fault is not None and fault in verdict.fault


def test_two_slots_are_enough_where_words_carry_their_step() -> None:
    assert search(Protocol(num_blocks=2, num_slots=2, tagged=True, num_steps=5)).fault is None
    three = Protocol(num_blocks=3, num_words=1, num_slots=2, tagged=True, num_steps=4)
    assert search(three).fault is None
