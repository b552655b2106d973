"""Text as it comes, token by token."""

from collections.abc import Callable, Sequence


class TextStream:
    """Turns tokens into text of whole characters, as soon as each is whole.

    Args:
        decode: ids to text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._ids: list[int] = []
        self._shown = ""

    def push(self, token: int) -> str:
        """The text that a token adds; "" while a character is not whole.

        Only the lines since the last fresh start are decoded again, so that a long text costs no
        more for each token than a short one.
        """
        self._ids.append(token)
        text = self._decode(self._ids)
        # A character may take several tokens; what is not whole yet waits for the next one.
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        new, self._shown = text[len(self._shown) :], text
        if new.endswith("\n") and len(self._ids) > 64:
            # The last one stays: some tokenizers drop a space in front of the first of all ids.
            self._ids = self._ids[-1:]
            self._shown = self._decode(self._ids)
        return new
