"""A model of how blocks exchange states, and a search through everything that can happen in it.

Each block repeats, for every step: read all words of the last step's slot, each by itself, until it
is there (``READ``); then publish its own words in this step's slot (``WRITE``). That is what
``fetch`` and ``units`` of cuda.cu do between two barriers of the block; a block is one actor, since
these barriers order its threads. Memory is as weak as the GPU's without fences: a store is under
way for any time, and stores to different words arrive in any order; those to one word in theirs.

The search goes through all states. It finds a block that can never go on (deadlock) and a word
taken that is not of the step wanted (stale, torn or not there yet); a word that is overwritten
while someone needs it shows as one of these.

A word's value is the number of its step, or ``EMPTY``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

EMPTY = -1
# What is left in a slot that was not emptied since an earlier launch.
LEFT = 100

Memory = tuple[int, ...]


class Store(NamedTuple):
    """A store under way."""

    block: int
    word: int
    value: int


class Block(NamedTuple):
    """Where a block is: the step it works on, the words it has read, those it has published."""

    step: int
    read: frozenset[int]
    written: int


class State(NamedTuple):
    """Everything at one moment."""

    memory: Memory
    blocks: tuple[Block, ...]
    stores: tuple[Store, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """What blocks do; the defaults are what cuda.cu does.

    Attributes:
        num_blocks: that take part.
        num_words: that each of them publishes a step; two show what tearing does.
        num_steps: T.
        num_slots: of a ring; None is one for each step, as in cuda.cu.
        tagged: whether a word's number of the step is published with it and looked at, which
            takes twice the bytes; else any word that is not empty is taken.
        cleared: whether a block empties its words of the slot after next when it publishes, as
            rings without tags must.
        looked_at: words of each block that a reader looks at before it takes all of them.
        waits: whether readers wait at all.
        collisions: steps whose computed words have the bits of an empty one.
        canonical: whether such words are changed before they are published.
        fills_first: whether slots are empty from the start, or hold words of an earlier launch.
    """

    num_blocks: int = 3
    num_words: int = 2
    num_steps: int = 3
    num_slots: int | None = None
    tagged: bool = False
    cleared: bool = False
    looked_at: int | None = None
    waits: bool = True
    collisions: frozenset[int] = frozenset()
    canonical: bool = True
    fills_first: bool = True

    @property
    def slots(self) -> int:
        """Slots in memory."""
        return self.num_steps + 1 if self.num_slots is None else self.num_slots

    def word(self, step: int, block: int, number: int) -> int:
        """Where a block's word of a step is."""
        return ((step % self.slots) * self.num_blocks + block) * self.num_words + number

    def published(self, step: int) -> int:
        """What is published of a step."""
        return EMPTY if step in self.collisions and not self.canonical else step


class Verdict(NamedTuple):
    """What a search found.

    Attributes:
        fault: None, or what can go wrong.
        num_states: that were looked at.
    """

    fault: str | None
    num_states: int


def search(protocol: Protocol) -> Verdict:
    """Look at every state that can be reached."""
    first = _first(protocol)
    seen, waiting = {first}, [first]
    while waiting:
        state = waiting.pop()
        following = list(_following(protocol, state))
        for fault, _ in following:
            if fault is not None:
                return Verdict(fault, len(seen))
        if not following and any(block.step <= protocol.num_steps for block in state.blocks):
            return Verdict("deadlock", len(seen))
        for _, new in following:
            if new not in seen:
                seen.add(new)
                waiting.append(new)
    return Verdict(None, len(seen))


def _first(protocol: Protocol) -> State:
    """The first step's slot is there; no other, or those of an earlier launch."""
    old = EMPTY if protocol.fills_first else LEFT
    memory = [old] * (protocol.slots * protocol.num_blocks * protocol.num_words)
    for block in range(protocol.num_blocks):
        for number in range(protocol.num_words):
            memory[protocol.word(0, block, number)] = 0
    blocks = (Block(1, frozenset(), 0),) * protocol.num_blocks
    return State(tuple(memory), blocks, ())


def _following(protocol: Protocol, state: State) -> Iterator[tuple[str | None, State]]:
    """What can happen next; a fault with the state that it is seen in."""
    yield from _arrivals(state)
    for number, block in enumerate(state.blocks):
        if block.step <= protocol.num_steps:
            yield from _of_block(protocol, state, number, block)


def _arrivals(state: State) -> Iterator[tuple[None, State]]:
    seen = set()
    for at, store in enumerate(state.stores):
        if store.word in seen:
            continue  # an earlier one to the same word comes first
        seen.add(store.word)
        memory = list(state.memory)
        memory[store.word] = store.value
        rest = state.stores[:at] + state.stores[at + 1 :]
        yield None, State(tuple(memory), state.blocks, rest)


def _of_block(
    protocol: Protocol, state: State, number: int, block: Block
) -> Iterator[tuple[str | None, State]]:
    wanted = block.step - 1
    words = product(range(protocol.num_blocks), range(protocol.num_words))
    missing = [each for each in words if protocol.word(0, *each) not in block.read]
    if not missing:
        yield None, _write(protocol, state, number, block)
        return
    for other, i in missing:
        value = state.memory[protocol.word(wanted, other, i)]
        is_looked_at = protocol.looked_at is None or i < protocol.looked_at
        if protocol.waits and is_looked_at and not _is_there(protocol, value, wanted):
            continue
        # A word that is taken with the one before it cannot be taken before it.
        if not is_looked_at and protocol.word(0, other, i - 1) not in block.read:
            continue
        new = block._replace(read=block.read | {protocol.word(0, other, i)})
        fault = None if value == wanted else f"step {wanted} read {_named(value)}"
        yield fault, _with(state, number, new)


def _is_there(protocol: Protocol, value: int, wanted: int) -> bool:
    return value == wanted if protocol.tagged else value != EMPTY


def _write(protocol: Protocol, state: State, number: int, block: Block) -> State:
    """Publish one more word; after the last the block goes on to the next step."""
    stores = state.stores
    word = protocol.word(block.step, number, block.written)
    if protocol.cleared:
        stores += (Store(number, protocol.word(block.step + 1, number, block.written), EMPTY),)
    stores += (Store(number, word, protocol.published(block.step)),)
    new = block._replace(written=block.written + 1)
    if new.written == protocol.num_words:
        new = Block(block.step + 1, frozenset(), 0)
    # The order of stores to different words means nothing.
    return _with(state, number, new)._replace(stores=tuple(sorted(stores, key=lambda s: s.word)))


def _with(state: State, number: int, block: Block) -> State:
    blocks = (*state.blocks[:number], block, *state.blocks[number + 1 :])
    return state._replace(blocks=blocks)


def _named(value: int) -> str:
    return "an empty word" if value == EMPTY else f"a word of step {value}"
