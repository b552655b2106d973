"""When sequences end."""

from typing import Any

import torch

from fivefold.hybrid_ssm.stopping import Stopping


class Bytes:
    """A tokenizer of bytes."""

    def decode(self, ids: Any) -> str:
        return bytes(ids).decode(errors="replace")


def feed(stopping: Stopping, *texts: str) -> list[bytes]:
    """What each sequence says until all have ended."""
    heard: list[list[int]] = [[] for _ in texts]
    for step in range(max(map(len, texts))):
        tokens = [text.encode()[min(step, len(text.encode()) - 1)] for text in texts]
        for said, token in zip(heard, stopping(torch.tensor(tokens)).tolist(), strict=True):
            said.append(token)
        if stopping.all_ended():
            break
    return [bytes(said) for said in heard]


def test_texts_end_sequences_wherever_tokens_are_cut() -> None:
    stopping = Stopping(None, 0, ["stop", "é!"], Bytes())
    heard = feed(stopping, "a long text and then stop here", "né! and more of it, a lot more....")
    assert heard[0] == b"a long text and then stop"
    assert heard[1] == "né!".encode() + bytes(len(heard[0]) - 4)


def test_text_before_the_tail_is_not_looked_at_again() -> None:
    stopping = Stopping(None, 0, "ab", Bytes())
    heard = feed(stopping, "a" * 50 + "b" + "c" * 9)
    assert heard == [b"a" * 50 + b"b"]


def test_ids_end_sequences_and_padding_follows() -> None:
    stopping = Stopping([3, 4], None)
    assert stopping.pad == 3
    assert stopping(torch.tensor([1, 4])).tolist() == [1, 4]
    assert not stopping.all_ended()
    assert stopping(torch.tensor([3, 9])).tolist() == [3, 3]
    assert stopping.all_ended()


def test_without_ends_nothing_ends() -> None:
    stopping = Stopping(None, None)
    stopping(torch.tensor([0]))
    assert not stopping.all_ended()
