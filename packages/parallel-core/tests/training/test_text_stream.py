"""Text as it comes."""

from fivefold.parallel_core.training.text_stream import TextStream


def decode(ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")


def test_characters_come_when_they_are_whole() -> None:
    stream = TextStream(decode)
    shown = [stream.push(byte) for byte in "né€x".encode()]
    assert shown == ["n", "", "é", "", "", "€", "x"]


def test_long_texts_are_decoded_by_lines() -> None:
    longest = 0

    def watched(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids)

    text = "a line of text that is not short\n" * 50
    stream = TextStream(watched)
    assert "".join(stream.push(byte) for byte in text.encode()) == text
    assert longest < 130


def test_lines_keep_the_space_that_they_begin_with() -> None:
    def without_first_space(ids: list[int]) -> str:
        return decode(ids).removeprefix(" ")

    text = "a line of text that is not short, and 64 tokens or more to the end\n  indented"
    stream = TextStream(without_first_space)
    assert "".join(stream.push(byte) for byte in text.encode()) == text
