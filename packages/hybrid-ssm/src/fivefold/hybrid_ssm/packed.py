"""A packed prefill: many documents in a row, and a cache in which each is a sequence of its own.

Legend: B rows, S tokens of a row, D documents of all rows, W taps of the convolution, K channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fivefold.hybrid_ssm.errors import HybridInputError


@dataclass(frozen=True, slots=True)
class Packed:
    """Where the documents lie, row by row.

    Attributes:
        spans: row, first token and end of each.
    """

    spans: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, starts_bs: Tensor) -> "Packed":
        """From integers that are equal within a document and differ between neighbours."""
        changes = torch.ones_like(starts_bs, dtype=torch.bool)
        changes[:, 1:] = starts_bs[:, 1:] != starts_bs[:, :-1]
        firsts = changes.nonzero().tolist()
        num_tokens = starts_bs.shape[1]
        ends = [
            after[1] if after[0] == row else num_tokens
            for (row, _), after in zip(firsts, [*firsts[1:], (-1, 0)], strict=True)
        ]
        return cls(tuple((row, at, end) for (row, at), end in zip(firsts, ends, strict=True)))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each document."""
        return [end - start for _, start, end in self.spans]

    @property
    def longest(self) -> int:
        """Tokens of the longest, which the cache then holds."""
        return max(self.lengths)

    def mask(self, device: torch.device) -> Tensor | None:
        """(D, longest), False before documents that are shorter; None where none is."""
        lengths, longest = self.lengths, self.longest
        if min(lengths) == longest:
            return None
        positions = torch.arange(longest, device=device)
        return positions >= longest - torch.tensor(lengths, device=device).unsqueeze(1)

    def cut(self, x: Tensor) -> list[Tensor]:
        """Each document's part (1, tokens, ...) of (B, S, ...)."""
        return [x[row : row + 1, start:end] for row, start, end in self.spans]

    def join(self, parts: list[Tensor], num_rows: int) -> Tensor:
        """The inverse of ``cut``."""
        return torch.cat(parts, dim=1).unflatten(1, (num_rows, -1)).squeeze(0)

    def last(self, x: Tensor, count: int) -> Tensor:
        """The last tokens of each document (D, count, ...).

        Raises:
            HybridInputError: one is shorter.
        """
        if count > min(self.lengths):
            raise HybridInputError(
                f"logits_to_keep is {count} and the documents have {self.lengths} tokens; keep at "
                f"most {min(self.lengths)}, or 0 for all"
            )
        return torch.cat([part[:, -count:] for part in self.cut(x)])

    def aligned(self, x: Tensor, length: int) -> Tensor:
        """The last ``length`` tokens of each document (D, length, ...), zeros before short ones."""
        out = x.new_zeros((len(self.spans), length, *x.shape[2:]))
        for index, part in enumerate(self.cut(x)):
            kept = min(length, part.shape[1])
            out[index, length - kept :] = part[0, part.shape[1] - kept :]
        return out
