"""When a sequence ends: at certain tokens, or at certain texts.

Legend: B sequences.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fivefold.hybrid_ssm.errors import HybridInputError


class TextDecoder(Protocol):
    """What is asked of a tokenizer: ours, transformers' and those of ``tokenizers`` have it."""

    def decode(self, ids: Any, /) -> Any:
        """The text of some ids."""


class Stopping:
    """Knows which sequences have ended, and fills those up.

    Args:
        ends: ids that end a sequence, which has them as its last token.
        pad: what an ended sequence goes on with; None is the first of ``ends``, or 0.
        stop_strings: texts that end a sequence.
        tokenizer: to read them with.

    Raises:
        HybridInputError: stop strings without a tokenizer, or an empty one.
    """

    def __init__(
        self,
        ends: int | Sequence[int] | None,
        pad: int | None,
        stop_strings: str | Sequence[str] | None = None,
        tokenizer: TextDecoder | None = None,
    ):
        self.ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        self.pad = pad if pad is not None else self.ends[0] if self.ends else 0
        texts = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or ())
        if texts and tokenizer is None:
            raise HybridInputError("stop_strings need a tokenizer, to know what tokens say")
        if "" in texts:
            raise HybridInputError("stop_strings has an empty text, which everything ends with")
        self.texts, self.tokenizer = texts, tokenizer
        # A token is of at least one byte, and the first one of a text may begin before it; some
        # more, as a character that is cut in its middle reads as another one.
        self._reach = max((len(text.encode()) for text in texts), default=0) + 8
        self._new: list[list[int]] = []
        self._ended: Tensor | None = None

    def __call__(self, next_b: Tensor) -> Tensor:
        """Take the next tokens (B,); gives them with padding where a sequence had ended."""
        if self._ended is None:
            self._ended = torch.zeros_like(next_b, dtype=torch.bool)
            self._new = [[] for _ in range(len(next_b))]
        ended_b, next_b = self._ended, torch.where(self._ended, self.pad, next_b)
        if self.ends:
            ended_b = ended_b | torch.isin(next_b, torch.tensor(self.ends, device=next_b.device))
        if self.texts:
            ended_b = ended_b | self._said(next_b)
        self._ended = ended_b
        return next_b

    def all_ended(self) -> bool:
        """Whether every sequence has."""
        asked = self.ends or self.texts
        return bool(asked and self._ended is not None and self._ended.all())

    def _said(self, next_b: Tensor) -> Tensor:
        """Which sequences have one of the texts among their last new tokens."""
        found = []
        for new, token in zip(self._new, next_b.tolist(), strict=True):
            new.append(token)
            del new[: -self._reach]
            said = str(self.tokenizer.decode(new)) if self.tokenizer is not None else ""
            found.append(any(text in said for text in self.texts))
        return torch.tensor(found, device=next_b.device)
