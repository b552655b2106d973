"""Packed sequences: several documents in one sequence, of which none sees another.

A packed batch is told by one integer for each token: the position, in its sequence, of the first
token of its document. Positions inside documents follow from it, and so does what a causal query
sees: the keys from its document's start up to itself. It is split like the tokens, so a rank of
context parallelism needs no more than its own.

Attention then runs over the documents instead of under a mask: documents of about one length go
through the core together, as the sequences of a batch, so that neither the scores between documents
nor a mask of S² values are ever made.

Legend: B sequences, S tokens of the whole sequence, P tokens here, H heads, D width of a head.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from fivefold.parallel_core.document_starts import starts_after, starts_of_ids, starts_of_lengths
from fivefold.parallel_core.errors import ConfigError

__all__ = [
    "Block",
    "Documents",
    "Partial",
    "attend_blocks",
    "starts_after",
    "starts_of_ids",
    "starts_of_lengths",
]

Partial = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""Some queries, keys, values and the offset between their positions, to the attention in which
query i sees the keys up to i + offset, (B, P, H, D), and its log-sum-exp (B, P, H)."""


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive queries of one sequence and the keys that they may see.

    Attributes:
        row: of the batch.
        queries: indices among the queries at hand.
        keys: indices among the keys at hand.
        offset: query i of these sees key j of these where j <= i + offset.
    """

    row: int
    queries: range
    keys: range
    offset: int


class Documents:
    """The documents of the tokens that this rank holds, for one forward pass.

    Their borders are read to the host when they are first asked for, once for all layers.

    Args:
        starts: (B, P) integers: for each token here the position of its document's first token,
            counted in the whole sequence.

    Raises:
        ConfigError: not such a tensor.
    """

    def __init__(self, starts: Tensor):
        if starts.dim() != 2 or starts.is_floating_point() or starts.dtype == torch.bool:
            raise ConfigError(
                f"document starts are integers (sequences, tokens); found {starts.dtype} of shape "
                f"{tuple(starts.shape)}"
            )
        self.starts = starts
        self._on_host: Tensor | None = None
        self._runs: dict[tuple[range, int], list[list[tuple[int, range]]]] = {}
        self._whole: Documents | None = None

    def positions(self, positions_p: Tensor) -> Tensor:
        """Positions inside documents (B, P), from those in the whole sequence (P,)."""
        return positions_p - self.starts

    def whole(self, gather: Callable[[Tensor], Tensor]) -> "Documents":
        """The documents of all tokens, as ``gather`` makes them of (B, P); it runs once."""
        if self._whole is None:
            self._whole = Documents(gather(self.starts))
        return self._whole

    def attend(self, core: Partial, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention within documents where all tokens are here.

        Args:
            core: see ``Partial``.
            q: (B, S, H, D).
            k: (B, S, heads, D).
            v: like k.

        Returns:
            (B, S, H, D).
        """
        everything = range(q.shape[1])
        self.check(q)
        return attend_blocks(core, q, k, v, self.blocks(everything, 0, everything))[0]

    def check(self, x: Tensor) -> None:
        """Check that there is a start for each token of ``x``.

        Raises:
            ConfigError: there is not.
        """
        if x.shape[:2] != self.starts.shape:
            raise ConfigError(
                f"document starts of shape {tuple(self.starts.shape)} for {x.shape[0]} sequences "
                f"of {x.shape[1]} tokens here; each token needs one"
            )

    def blocks(self, queries: range, first: int, keys: range) -> list[Block]:
        """Which of some keys each of some queries may see.

        Args:
            queries: consecutive positions of the whole sequence that this rank holds.
            first: index, among the tokens here, of the first of them.
            keys: consecutive positions.

        Returns:
            In the order of the queries; those that see none of these keys are in no block.

        Raises:
            ConfigError: the starts are those of no documents.
        """
        found = []
        for row, runs in enumerate(self._runs_of(queries, first)):
            for start, of_run in runs:
                seen = range(max(start, keys.start), min(of_run.stop, keys.stop))
                if seen:
                    found.append(
                        Block(
                            row,
                            _shifted(of_run, queries.start),
                            _shifted(seen, keys.start),
                            of_run.start - seen.start,
                        )
                    )
        return found

    def _runs_of(self, queries: range, first: int) -> list[list[tuple[int, range]]]:
        """For each sequence its documents among ``queries``: start, and positions here."""
        if (queries, first) not in self._runs:
            if self._on_host is None:
                self._on_host = self.starts.detach().cpu()
            part = self._on_host[:, first : first + len(queries)]
            self._runs[queries, first] = [_runs_in(row, queries) for row in part]
        return self._runs[queries, first]


def _runs_in(starts_p: Tensor, queries: range) -> list[tuple[int, range]]:
    values, counts = torch.unique_consecutive(starts_p, return_counts=True)
    runs, position = [], queries.start
    for start, count in zip(values.tolist(), counts.tolist(), strict=True):
        begun_before = position == queries.start and 0 <= start < position
        if start != position and not begun_before:
            raise ConfigError(
                f"the token at position {position} says that its document starts at {start}; it "
                f"starts there or goes on from the token before"
            )
        runs.append((start, range(position, position + count)))
        position += count
    return runs


def _shifted(positions: range, by: int) -> range:
    return range(positions.start - by, positions.stop - by)


# ---- attention over blocks -----------------------------------------------------------------


def attend_blocks(
    core: Partial, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Block]
) -> tuple[Tensor, Tensor]:
    """Attention in which every block's queries see its keys, causally; differentiable.

    Args:
        core: see ``Partial``.
        q: (B, P, H, D).
        k: (B, T, heads, D).
        v: like k.
        blocks: of these; no query in two.

    Returns:
        (B, P, H, D) and the log-sum-exp of the scores (B, P, H); zero and minus infinity for
        queries in no block.
    """
    everything = Block(0, range(q.shape[1]), range(k.shape[1]), 0)
    groups = list(_together(blocks)) if q.shape[1] else [[everything] * q.shape[0]]
    if len(groups) == 1 and _is_slice(groups[0], q.shape[0], q.shape[1]):
        at = groups[0][0]
        keys = slice(at.keys.start, at.keys.stop)
        return core(q, k[:, keys], v[:, keys], at.offset)
    found = [_attend_group(core, q, k, v, group) for group in groups]
    places = torch.cat([place for place, _, _ in found])
    out = _placed(places, [out for _, out, _ in found], q.shape[:2], 0.0)
    return out, _placed(places, [lse for _, _, lse in found], q.shape[:2], -torch.inf)


def _is_slice(group: Sequence[Block], num_rows: int, num_queries: int) -> bool:
    """Whether a group has the same keys in every row, and all queries."""
    same = {(block.queries, block.keys, block.offset) for block in group}
    return len(group) == num_rows and len(same) == 1 and len(group[0].queries) == num_queries


def _together(blocks: Sequence[Block]) -> Iterator[list[Block]]:
    """Blocks that go through the core in one call."""

    def kind(block: Block) -> tuple[int, int, int]:
        # Where queries and keys are the same tokens, a longer one can be filled up at its end:
        # causality keeps the filling from being seen.
        if block.offset == 0 and len(block.queries) == len(block.keys):
            size = _rounded(len(block.queries))
            return size, size, 0
        return len(block.queries), len(block.keys), block.offset

    for _, group in groupby(sorted(blocks, key=kind), key=kind):
        yield list(group)


def _rounded(length: int) -> int:
    """At most a quarter more, so that few lengths are left: 4, 5, 6, 7, 8, 10, 12, 14, 16, 20."""
    step = 1 << max(length.bit_length() - 3, 0)
    return -(-length // step) * step


def _attend_group(
    core: Partial, q: Tensor, k: Tensor, v: Tensor, group: Sequence[Block]
) -> tuple[Tensor, Tensor, Tensor]:
    """Places (N,) among the flattened queries, and their outputs (N, H, D) and (N, H)."""
    queries, real = _indices([(b.row, b.queries) for b in group], q)
    keys, _ = _indices([(b.row, b.keys) for b in group], k)
    out, lse = core(_taken(q, queries), _taken(k, keys), _taken(v, keys), group[0].offset)
    return queries[real], out[real], lse[real]


def _indices(ranges: Sequence[tuple[int, range]], x: Tensor) -> tuple[Tensor, Tensor]:
    """Of ranges in rows, filled up to one length: indices into x flattened, and which are real."""
    longest = max(len(indices) for _, indices in ranges)
    size = longest if len({len(r) for _, r in ranges}) == 1 else _rounded(longest)
    first = torch.tensor([[row * x.shape[1] + r.start] for row, r in ranges], device=x.device)
    length = torch.tensor([[len(r)] for _, r in ranges], device=x.device)
    steps = torch.arange(size, device=x.device)
    # The filling repeats the last token, which exists.
    return first + torch.minimum(steps, length - 1), steps < length


def _taken(x: Tensor, indices: Tensor) -> Tensor:
    """(B, P, ...) to (N, length, ...)."""
    return x.flatten(0, 1).index_select(0, indices.flatten()).unflatten(0, indices.shape)


def _placed(places: Tensor, parts: Sequence[Tensor], shape: torch.Size, empty: float) -> Tensor:
    """Parts (N, ...) at their places of (B, P, ...), which is ``empty`` elsewhere."""
    values = torch.cat(list(parts))
    whole = values.new_full((shape.numel(), *values.shape[1:]), empty)
    return whole.index_copy(0, places, values).unflatten(0, shape)
