"""Ring attention: keys and values travel round the ranks, and partial results are put together.

Liu et al., arXiv 2310.01889. No rank ever holds more than two ranks' keys and values; in backward
they travel again, and their gradients with them.

Legend: B sequences, P tokens here, H heads, D width of a head.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fivefold.parallel_core.collectives import start_shift
from fivefold.parallel_core.context import ContextCore
from fivefold.parallel_core.documents import Documents, attend_blocks
from fivefold.parallel_core.rng import OwnStream, Replay
from fivefold.parallel_core.topology import Axis


class RingContext(ContextCore):
    """An attention core whose keys and values pass by, rank by rank.

    Beside what every core can do, this needs ``core.partial(q, k, v, offset)``: attention in which
    query i sees the keys up to i + ``offset``, and its log-sum-exp (B, queries, H), differentiable;
    0 and -inf for a query that sees none. With the zigzag split all ranks work equally. Keys of
    packed documents pass all ranks, and only those of a rank's own documents are worked on.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        """One turn of the ring."""
        return _Ring.apply(q, k, v, self, documents)

    def pairs(
        self, length: int, source: int, documents: Documents | None = None
    ) -> Iterator["Pair"]:
        """Stretches of queries here and keys of rank ``source`` that see each other."""
        start = 0
        for queries in self.held(length):
            mine = slice(start, start + len(queries))
            start, first = mine.stop, 0
            for keys in self.held(length, source):
                theirs = slice(first, first + len(keys))
                first = theirs.stop
                attend = self._attention(queries, mine.start, keys, documents)
                if attend is not None:
                    yield Pair(mine, theirs, attend)

    def _attention(
        self, queries: range, first: int, keys: range, documents: Documents | None
    ) -> "Attend | None":
        """How some queries see some keys; None where none sees any."""
        if documents is None:
            offset = queries.start - keys.start
            sees = keys.start < queries.stop
            return (lambda q, k, v: self.partial(q, k, v, offset)) if sees else None
        blocks = documents.blocks(queries, first, keys)
        return (lambda q, k, v: attend_blocks(self.partial, q, k, v, blocks)) if blocks else None


Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Pair:
    """A stretch of queries and one of keys, as slices of what their ranks hold.

    Attributes:
        queries: here.
        keys: of another rank.
        attend: gives their partial result.
    """

    queries: slice
    keys: slice
    attend: Attend


class _Ring(torch.autograd.Function):
    """The partial results o_i, l_i merge to l = log Σ exp l_i and o = Σ exp(l_i - l) o_i.

    Backward gives each part do_i = w_i do and dl_i = w_i (do·o_i - do·o), with w_i = exp(l_i - l),
    and repeats its forward: what is kept does not grow with the number of ranks.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: RingContext, documents: Documents | None
    ) -> Tensor:
        ctx.replay = Replay(q) if isinstance(ring.core, OwnStream) else None
        wide = torch.promote_types(q.dtype, torch.float32)
        out = q.new_zeros((*q.shape[:-1], v.shape[-1]), dtype=wide)
        lse = q.new_full(q.shape[:-1], -torch.inf, dtype=wide)
        for source, kv in _travelling(torch.cat((k, v), dim=-1), ring.axis):
            key, value = kv.split((k.shape[-1], v.shape[-1]), dim=-1)
            for pair in ring.pairs(q.shape[1], source, documents):
                mine, theirs = pair.queries, pair.keys
                part = pair.attend(q[:, mine], key[:, theirs], value[:, theirs])
                _merge(out[:, mine], lse[:, mine], *part)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ring, ctx.documents = ring, documents
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # The parts are made in the order of forward, so a random core draws as it did there.
        with nullcontext() if ctx.replay is None else ctx.replay.again():
            return _ring_backward(ctx, *grads)


def _ring_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse = ctx.saved_tensors
    ring, (dout,) = ctx.ring, grads
    widths = (k.shape[-1], v.shape[-1])
    dq = torch.zeros_like(q, dtype=lse.dtype)
    delta = (dout.to(lse.dtype) * out).sum(-1)
    arrive: Callable[[], Tensor] | None = None
    for source, kv in _travelling(torch.cat((k, v), dim=-1), ring.axis):
        # Its gradient travels behind it, one more hop than it, home to its own rank.
        dkv = torch.zeros_like(kv, dtype=lse.dtype) if arrive is None else arrive()
        for pair in ring.pairs(q.shape[1], source, ctx.documents):
            mine, theirs = pair.queries, pair.keys
            inputs = (q[:, mine], *(x[:, theirs] for x in kv.split(widths, dim=-1)))
            upstream = (dout[:, mine], lse[:, mine], delta[:, mine])
            *gradients, dvalue = _part_backward(pair.attend, inputs, upstream)
            dq[:, mine] += gradients[0]
            dkv[:, theirs] += torch.cat((gradients[1], dvalue), dim=-1)
        arrive = start_shift(dkv, ring.axis)
    dk, dv = arrive().to(k.dtype).split(widths, dim=-1) if arrive is not None else (None, None)
    return dq.to(q.dtype), dk, dv, None, None


def _travelling(x: Tensor, axis: Axis) -> Iterator[tuple[int, Tensor]]:
    """Every rank's ``x`` in turn, with its rank; the next comes while this one is worked on."""
    for step in range(axis.size):
        arrive = start_shift(x, axis) if step + 1 < axis.size else None
        yield (axis.rank - step) % axis.size, x
        if arrive is not None:
            x = arrive()


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Take a partial result into ``out`` and ``lse``, in place."""
    total = torch.logaddexp(lse, part_lse)
    # A query that has seen nothing yet has a total of -inf, and -inf - -inf would be NaN.
    seen = total.masked_fill(total.isneginf(), 0)
    out.mul_((lse - seen).exp().unsqueeze(-1))
    out.add_(part * (part_lse - seen).exp().unsqueeze(-1))
    lse.copy_(total)


def _part_backward(
    attend: Attend, inputs: tuple[Tensor, ...], upstream: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """Gradients of one part's queries, keys and values; its forward is repeated."""
    dout, lse, delta = upstream
    query, key, value = leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        part, part_lse = attend(query, key, value)
    seen = lse.masked_fill(lse.isneginf(), 0)
    weight = (part_lse.detach() - seen).exp()
    dpart = dout * weight.unsqueeze(-1)
    dlse = (dpart * part.detach()).sum(-1) - weight * delta
    return torch.autograd.grad((part, part_lse), leaves, (dpart.to(part.dtype), dlse))
