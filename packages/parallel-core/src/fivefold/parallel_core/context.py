"""Context parallelism: attention over sequences that are split over ranks.

Three ways, for any attention core: gather all keys and values (``GatheredContext``), pass them
round the ranks (``RingContext``, in ``ring``), or exchange tokens for heads (``HeadsContext``).

What is not attention splits as well: a ``SplitMixer`` of a package's own, on ``carry``.

Legend: B sequences, S tokens of the whole sequence, P = S/cp tokens here, D width of a head.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from fivefold.parallel_core.collectives import all_gather, all_to_all, gather_along
from fivefold.parallel_core.documents import Documents, Partial, attend_blocks
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.sequence_split import Split, held
from fivefold.parallel_core.topology import Axis


class SplitMixer(nn.Module):
    """What mixes tokens of a sequence that is split over ranks; the base of all such forms.

    A package makes a mixer of its own parallel by a subclass whose ``forward`` has the arguments
    of the mixer it stands for, with this rank's tokens in place of all, and which its plan names:
    ``"layers.*.mixer.core": SplitContext(form=SplitScan)``. It holds the mixer as ``core`` and
    must have no parameters, nor must the mixer, as their names would change; they belong to
    modules beside it. ``carry`` brings what crosses the borders.

    Args:
        core: what stands there on one device.
        axis: the ranks that split the sequence.
        split: how they split it.
    """

    def __init__(self, core: nn.Module, axis: Axis, split: Split = "contiguous"):
        super().__init__()
        self.core, self.axis, self.split = core, axis, split

    def held(self, length: int, rank: int | None = None) -> tuple[range, ...]:
        """Positions that a rank holds where every rank holds ``length``; the default is this."""
        rank = self.axis.rank if rank is None else rank
        return held(length * self.axis.size, self.axis.size, rank, self.split)

    def pieces(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, P, ...) as the consecutive pieces of the sequence that it is made of."""
        return x.split([len(at) for at in self.held(x.shape[1])], dim=1)


class ContextCore(SplitMixer, ABC):
    """An attention core over a split sequence; the base of its three forms.

    Args:
        core: called as ``core(q, k, v, query_start=...)``: causal attention of queries at
            consecutive positions from ``query_start`` on over the keys from position 0 on. Packed
            documents need ``core.partial`` besides, see ``documents.Partial``.
        axis: the ranks that split the sequence.
        split: how they split it.
    """

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        query_start: int | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """(B, P, heads, D) queries, keys and values to (B, P, heads, D).

        Args:
            q: of this rank's tokens.
            k: of this rank's tokens.
            v: of this rank's tokens.
            query_start: refused, as there is no cache of keys over a split sequence.
            documents: of this rank's tokens, where several are packed into a sequence.

        Raises:
            ValueError: a cache is used.
            ConfigError: the documents do not fit the tokens or the core.
        """
        if query_start is not None:
            raise ValueError(
                "a key-value cache was passed to attention under context parallelism "
                f"(cp={self.axis.size}); generate with cp=1"
            )
        if documents is not None:
            documents.check(q)
        return self.attend(q, k, v, documents)

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        """What ``forward`` computes."""

    @property
    def partial(self) -> Partial:
        """The core's attention of some queries to some keys, with its log-sum-exp.

        Raises:
            ConfigError: it has none.
        """
        partial: Partial | None = getattr(self.core, "partial", None)
        if partial is None:
            raise ConfigError(
                f"packed documents need an attention core with partial(q, k, v, offset), which "
                f"{type(self.core).__name__} has not; train on one document in each sequence"
            )
        return partial


class GatheredContext(ContextCore):
    """Keys and values of all ranks are gathered, and their gradients reduce-scattered.

    Every rank attends from its own queries. As in Llama 3's training (arXiv 2407.21783).
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        """One call of the core for each stretch of queries, or for its documents."""
        kv = all_gather(torch.cat((k, v), dim=-1), self.axis, dim=1)
        k, v = restore_order(kv, self.axis, self.split).split((k.shape[-1], v.shape[-1]), dim=-1)
        outs, first = [], 0
        for at in self.held(q.shape[1]):
            # The core masks what lies after a query; what lies after all of them is not read.
            seen = (q[:, first : first + len(at)], k[:, : at.stop], v[:, : at.stop])
            if documents is None:
                outs.append(self.core(*seen, query_start=at.start))
            else:
                blocks = documents.blocks(at, first, range(at.stop))
                outs.append(attend_blocks(self.partial, *seen, blocks)[0])
            first += len(at)
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


class HeadsContext(ContextCore):
    """Each rank gets the whole sequence for some of the heads, and gives the tokens back.

    DeepSpeed-Ulysses, Jacobs et al., arXiv 2309.14509. Query heads must divide by the ranks; fewer
    key heads than ranks are repeated first, so that each rank has the one its queries share.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        """Two exchanges around one call of the core.

        The documents of the whole sequence are gathered once for all layers.
        """
        size = self.axis.size
        if q.shape[2] % size or (k.shape[2] % size and size % k.shape[2]):
            raise ConfigError(
                f"cp={size} exchanges tokens for heads: it must divide the {q.shape[2]} query "
                f"heads, and divide or be a multiple of the {k.shape[2]} key heads of a rank; "
                "choose another cp, or attention by ring or gather"
            )
        if k.shape[2] < size:
            k, v = (x.repeat_interleave(size // x.shape[2], dim=2) for x in (k, v))
        q, k, v = (self._tokens_for_heads(x) for x in (q, k, v))
        if documents is None:
            return self._heads_for_tokens(self.core(q, k, v, query_start=0))
        whole = documents.whole(lambda starts: gather_held(starts, self.axis, self.split))
        return self._heads_for_tokens(whole.attend(self.partial, q, k, v))

    def _tokens_for_heads(self, x: Tensor) -> Tensor:
        """(B, P, heads, D) to (B, S, heads/cp, D), positions in order."""
        parts = self._exchange(torch.stack(x.chunk(self.axis.size, dim=2)))
        return restore_order(torch.cat(list(parts), dim=1), self.axis, self.split)

    def _heads_for_tokens(self, x: Tensor) -> Tensor:
        """(B, S, heads/cp, D) to (B, P, heads, D)."""
        positions = _held_by_all(x.shape[1], self.axis, self.split, x.device)
        whole = x if positions is None else x.index_select(1, positions)
        return torch.cat(list(self._exchange(torch.stack(whole.chunk(self.axis.size, 1)))), dim=2)

    def _exchange(self, parts: Tensor) -> Tensor:
        """(cp, ...): the r-th part goes to rank r, and what rank r sent comes r-th."""
        rows = parts.flatten(0, 1)
        splits = [parts.shape[1]] * self.axis.size
        return all_to_all(rows, splits, splits, self.axis).view(parts.shape)


class SplitPositions(nn.Module):
    """Positions of this rank's part of the sequence."""

    def __init__(self, positions: nn.Module, axis: Axis, split: Split = "contiguous"):
        super().__init__()
        self.positions, self.axis, self.split = positions, axis, split

    def forward(self, length: int, *args: Any, **kwargs: Any) -> Tensor:
        """The positions of the ``length`` tokens that are here."""
        stretches = held(length * self.axis.size, self.axis.size, self.axis.rank, self.split)
        parts = [self.positions(len(at), *args, **kwargs) + at.start for at in stretches]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def take_held(x: Tensor, axis: Axis, split: Split, dim: int = 1) -> Tensor:
    """This rank's part of a whole sequence along ``dim``; nothing is sent."""
    stretches = held(x.shape[dim], axis.size, axis.rank, split)
    return torch.cat([x.narrow(dim, at.start, len(at)) for at in stretches], dim)


def gather_held(x: Tensor, axis: Axis, split: Split) -> Tensor:
    """The whole sequence along dim 1 from every rank's part; no gradient."""
    return restore_order(gather_along(x, axis, 1), axis, split)


def restore_order(x: Tensor, axis: Axis, split: Split) -> Tensor:
    """Parts of all ranks, laid one after the other along dim 1, into the sequence's order."""
    positions = _held_by_all(x.shape[1], axis, split, x.device)
    return x if positions is None else x.index_select(1, positions.argsort())


def _held_by_all(length: int, axis: Axis, split: Split, device: torch.device) -> Tensor | None:
    """Positions that rank 0, 1, ... hold, (S,); None where these are in order."""
    if split == "contiguous" or axis.size == 1:
        return None
    stretches = [at for rank in range(axis.size) for at in held(length, axis.size, rank, split)]
    return torch.cat([torch.arange(at.start, at.stop, device=device) for at in stretches])
