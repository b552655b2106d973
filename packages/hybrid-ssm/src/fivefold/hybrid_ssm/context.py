"""Mamba-2 over sequences that are split over ranks: context parallelism, in two ways.

Either each rank gets the whole sequence for some of the heads and gives the tokens back
(``HeadsMamba``), or each rank scans its own tokens and only states pass between the ranks
(``StatesMamba``): what it sends does not grow with the sequence.

Legend: B sequences, S tokens of the whole sequence, P = S/cp tokens here, L tokens of a stretch,
K channels, W taps, H heads, D width of a head, G groups, N length of a state, J stretches of all
ranks.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fivefold.hybrid_ssm.blocks.heads import HeadValues
from fivefold.hybrid_ssm.blocks.mamba import MambaCore, Rules
from fivefold.hybrid_ssm.cache import MambaState
from fivefold.hybrid_ssm.errors import HybridInputError
from fivefold.hybrid_ssm.memory import ALONE, Context
from fivefold.parallel_core.collectives import all_gather, all_to_all
from fivefold.parallel_core.context import gather_held, restore_order
from fivefold.parallel_core.documents import Documents
from fivefold.parallel_core.sequence_split import Split, held, num_pieces
from fivefold.parallel_core.topology import Axis


class SplitMamba(MambaCore):
    """Convolution and scan of a split sequence; the base of its two forms.

    Args:
        rules: of the core that this stands for.
        axis: the ranks that split the sequence.
        split: how they split it.
    """

    def __init__(self, rules: Rules, axis: Axis, split: Split = "contiguous"):
        super().__init__(rules)
        self.axis, self.split = axis, split

    def check(self, context: Context, state: MambaState | None) -> None:
        """Refuse what only whole sequences have.

        Raises:
            HybridInputError: there is a cache or padding.
        """
        if state is not None or context.mask is not None:
            raise HybridInputError(
                f"a cache or an attention_mask came to a sequence that is split over cp="
                f"{self.axis.size} ranks; generate with cp=1"
            )


class HeadsMamba(SplitMamba):
    """Tokens are exchanged for heads, as DeepSpeed-Ulysses does for attention (2309.14509).

    The heads of a rank must divide by the ranks; where groups are fewer than ranks they are
    repeated first.
    """

    def forward(
        self,
        x_bsk: Tensor,
        b_bsk: Tensor,
        c_bsk: Tensor,
        dt_bsh: Tensor,
        values: HeadValues,
        context: Context = ALONE,
        state: MambaState | None = None,
    ) -> Tensor:
        """See ``MambaCore.forward``; the tokens are this rank's."""
        self.check(context, state)
        inputs, values = _repeat_groups((x_bsk, b_bsk, c_bsk, dt_bsh), values, self)
        x, b, c, dt = (self._tokens_for_heads(each) for each in inputs)
        documents = context.documents
        if documents is not None:
            documents = documents.whole(lambda s: gather_held(s, self.axis, self.split))
        frame = Context(documents=documents)
        y_bsk = super().forward(x, b, c, dt, self._mine(values), frame)
        return self._heads_for_tokens(y_bsk)

    def _mine(self, values: HeadValues) -> HeadValues:
        """The values of the heads that this rank takes."""

        def part(tensor: Tensor) -> Tensor:
            return tensor.chunk(self.axis.size)[self.axis.rank]

        weights = tuple(part(each) for each in values.weights)
        biases = tuple(None if each is None else part(each) for each in values.biases)
        rest = (part(each) for each in (values.decay, values.skip, values.dt_bias))
        return HeadValues(weights, biases, *rest)  # type: ignore[arg-type]

    def _tokens_for_heads(self, x_bpk: Tensor) -> Tensor:
        """(B, P, K) to (B, S, K/cp), positions in order."""
        parts = self._exchange(torch.stack(x_bpk.chunk(self.axis.size, dim=2)))
        return restore_order(torch.cat(list(parts), dim=1), self.axis, self.split)

    def _heads_for_tokens(self, x_bsk: Tensor) -> Tensor:
        """(B, S, K/cp) to (B, P, K)."""
        size, length = self.axis.size, x_bsk.shape[1]
        parts = []
        for rank in range(size):
            of_rank = [x_bsk[:, at.start : at.stop] for at in held(length, size, rank, self.split)]
            parts.append(torch.cat(of_rank, dim=1))
        return torch.cat(list(self._exchange(torch.stack(parts))), dim=2)

    def _exchange(self, parts: Tensor) -> Tensor:
        """(cp, ...): the r-th part goes to rank r, and what rank r sent comes r-th."""
        splits = [parts.shape[1]] * self.axis.size
        return all_to_all(parts.flatten(0, 1), splits, splits, self.axis).view(parts.shape)


def _repeat_groups(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor], values: HeadValues, core: SplitMamba
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], HeadValues]:
    """B and C, and their taps, so often that every rank has a group of its own."""
    x, b, c, dt = inputs
    size, state = core.axis.size, core.rules.state_size
    num_heads, num_groups = dt.shape[-1], b.shape[-1] // state
    if num_heads % size or (num_groups % size and size % num_groups):
        raise HybridInputError(
            f"cp={size} exchanges tokens for heads: it must divide the {num_heads} Mamba heads of "
            f"a rank, and divide or be a multiple of its {num_groups} groups; choose another cp, "
            "or let states pass"
        )
    copies = max(size // num_groups, 1)
    if copies == 1:
        return inputs, values

    def repeat(tensor: Tensor, dim: int) -> Tensor:
        return (
            tensor.unflatten(dim, (-1, state)).repeat_interleave(copies, dim).flatten(dim, dim + 1)
        )

    weights = (values.weights[0], *(repeat(each, 0) for each in values.weights[1:]))
    biases = (
        values.biases[0],
        *(None if each is None else repeat(each, 0) for each in values.biases[1:]),
    )
    values = replace(values, weights=weights, biases=biases)  # type: ignore[arg-type]
    return (x, repeat(b, 2), repeat(c, 2), dt), values


class StatesMamba(SplitMamba):
    """Every rank scans its own stretches; ends of stretches go to all ranks, tokens to none.

    The state after a stretch is ``decay * state before + own``, so from every stretch's decay
    (B, H), own state (B, H, D, N) and last W - 1 inputs of the convolution all ranks know the
    states between (arXiv 2405.21060, section 6, between ranks instead of chunks). The output that
    the state before adds is ``C`` times it, decayed up to each token.
    """

    def forward(
        self,
        x_bsk: Tensor,
        b_bsk: Tensor,
        c_bsk: Tensor,
        dt_bsh: Tensor,
        values: HeadValues,
        context: Context = ALONE,
        state: MambaState | None = None,
    ) -> Tensor:
        """See ``MambaCore.forward``; the tokens are this rank's."""
        self.check(context, state)
        frames = self._frames(x_bsk, context)
        inputs = [each.chunk(len(frames), dim=1) for each in (x_bsk, b_bsk, c_bsk)]
        triples = list(zip(*inputs, strict=True))
        halos = self._halos(triples, values, frames)
        dts = dt_bsh.chunk(len(frames), dim=1)
        stretches = [
            self._scan_stretch(*each, values)
            for each in zip(triples, dts, frames, halos, strict=True)
        ]
        befores = self._states_before(stretches)
        outs = [
            stretch.y_blk + self._carried(stretch, before)
            for stretch, before in zip(stretches, befores, strict=True)
        ]
        return torch.cat(outs, dim=1)

    def _frames(self, x_bsk: Tensor, context: Context) -> "list[_Frame]":
        """How each of this rank's stretches lies in the sequence and its documents."""
        size, pieces = self.axis.size, num_pieces(self.split)
        spans = held(x_bsk.shape[1] * size, size, self.axis.rank, self.split)
        parts: tuple[Tensor | None, ...] = (None,) * pieces
        if context.documents is not None:
            parts = context.documents.starts.chunk(pieces, dim=1)
        return [_Frame.of(span, part, x_bsk) for span, part in zip(spans, parts, strict=True)]

    def _scan_stretch(
        self,
        triple: tuple[Tensor, Tensor, Tensor],
        dt_blh: Tensor,
        frame: "_Frame",
        halo: Tensor,
        values: HeadValues,
    ) -> "_Stretch":
        """One stretch as if no state came before it."""
        x, b, c, _ = self.convolve(triple, values, frame.context, halo)
        y_blk, own = self.scan((x, b, c, dt_blh), values, frame.context)
        return _Stretch(y_blk, own, c, _decays(dt_blh, values, self.rules), frame)

    def _gather(self, parts: Tensor) -> Tensor:
        """All ranks' stretches (n, ...) in the order of the sequence, (J, ...)."""
        gathered = all_gather(parts, self.axis, 0)
        return gathered[torch.tensor(self._order(), device=parts.device)]

    def _order(self) -> list[int]:
        """Where each stretch of the sequence lies among all ranks' stretches."""
        size, pieces = self.axis.size, num_pieces(self.split)
        length = size * pieces
        firsts = [at.start for rank in range(size) for at in held(length, size, rank, self.split)]
        return sorted(range(length), key=firsts.__getitem__)

    def _mine(self) -> list[int]:
        """Indices of this rank's stretches in the sequence."""
        size, pieces = self.axis.size, num_pieces(self.split)
        return [at.start for at in held(size * pieces, size, self.axis.rank, self.split)]

    def _halos(
        self,
        triples: list[tuple[Tensor, ...]],
        values: HeadValues,
        frames: "list[_Frame]",
    ) -> list[Tensor]:
        """The W - 1 inputs before each of this rank's stretches, zero where they are not seen."""
        reach = values.weights[0].shape[1] - 1
        length = triples[0][0].shape[1]
        if length < reach:
            raise HybridInputError(
                f"stretches of {length} tokens are shorter than the {reach} that the convolution "
                f"looks back; use fewer ranks than cp={self.axis.size}, or longer sequences"
            )
        tails = [
            torch.cat([each[:, length - reach :] for each in triple], -1) for triple in triples
        ]
        every = self._gather(torch.stack(tails))
        before = torch.cat((torch.zeros_like(every[:1]), every[:-1]))
        return [
            before[index] * frame.seen_before(reach).unsqueeze(-1)
            for index, frame in zip(self._mine(), frames, strict=True)
        ]

    def _states_before(self, stretches: "list[_Stretch]") -> list[Tensor]:
        """From each stretch's own state and decay to the states before this rank's stretches."""
        # In one message, whose gradient every rank then sends in one message at one time.
        packed = [torch.cat((each.own.flatten(2), each.passing()), dim=-1) for each in stretches]
        every = self._gather(torch.stack(packed))
        state, befores = torch.zeros_like(stretches[0].own), []
        for each in every:
            befores.append(state)
            own, decay = each[..., :-1].view_as(state), each[..., -1:].unsqueeze(-1)
            state = decay * state + own
        # Taken from all of them together, so that no rank is without a gradient to send.
        together = torch.stack(befores)
        return [together[index] for index in self._mine()]

    def _carried(self, stretch: "_Stretch", before: Tensor) -> Tensor:
        """What the state before a stretch adds to its outputs (B, L, H*D)."""
        c_blgn = stretch.c_blk.unflatten(-1, (-1, self.rules.state_size)).to(before.dtype)
        before = before.unflatten(1, (c_blgn.shape[2], -1))
        y = torch.einsum("blgn,bghdn->blghd", c_blgn, before).flatten(2, 3)
        seen_blh = stretch.decays * stretch.frame.goes_on.unsqueeze(-1)
        return (y * seen_blh.unsqueeze(-1)).flatten(-2).to(stretch.y_blk.dtype)


def _decays(dt_blh: Tensor, values: HeadValues, rules: Rules) -> Tensor:
    """By which factor what was before a stretch is left at each of its tokens, (B, L, H)."""
    wide = torch.promote_types(dt_blh.dtype, values.decay.dtype)
    step_blh = F.softplus(dt_blh.to(wide) + values.dt_bias).clamp(*rules.dt_limit)
    return (step_blh * values.decay).cumsum(dim=1).exp()


@dataclass(frozen=True, slots=True)
class _Stretch:
    """A stretch that was scanned by itself: outputs, last state, C, decay up to each token."""

    y_blk: Tensor
    own: Tensor
    c_blk: Tensor
    decays: Tensor
    frame: "_Frame"

    def passing(self) -> Tensor:
        """The share of the state before that is left after it, (B, H, 1)."""
        return (self.decays[:, -1] * self.frame.passes.unsqueeze(1)).unsqueeze(-1)


class _Frame:
    """How a stretch lies in the documents.

    Attributes:
        context: documents of the stretch, for the ops.
        goes_on: (B, L), 1 where a token's document began before the stretch.
        passes: (B,), 1 where the last token's did, so that the state passes through.
    """

    def __init__(self, span: range, starts: Tensor | None, goes_on: Tensor):
        self.span, self.starts = span, starts
        self.context = ALONE if starts is None else Context(documents=Documents(starts))
        self.goes_on, self.passes = goes_on, goes_on[:, -1]

    @classmethod
    def of(cls, span: range, starts: Tensor | None, like: Tensor) -> "_Frame":
        """Of the positions ``span`` of a sequence, whose documents' starts are (B, L)."""
        if starts is None:
            return cls(span, None, like.new_ones(1, 1))
        return cls(span, starts, (starts < span.start).to(like.dtype))

    def seen_before(self, reach: int) -> Tensor:
        """Which of the ``reach`` tokens before the stretch its first token sees, (B, reach)."""
        if self.starts is None:
            return self.goes_on
        positions = torch.arange(-reach, 0, device=self.starts.device) + self.span.start
        return (positions >= self.starts[:, :1]).to(self.goes_on.dtype)
