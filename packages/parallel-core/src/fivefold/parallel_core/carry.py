"""What the pieces of a split sequence hand on to each other, for mixers that are not attention.

A rank of "cp" holds one piece of the sequence, or two under the zigzag split. A convolution needs
the last tokens of the piece before (``halo``), a recurrence the state with which that piece ends
(``incoming``). Both are exact in forward and backward, and neither waits for one rank after the
other: the pieces' states are gathered in one message and put together by every rank for itself.

Legend: N pieces here (1 or 2), A pieces of all ranks, B sequences, W tokens handed on.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fivefold.parallel_core.collectives import all_gather, all_to_all
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.sequence_split import Split, held
from fivefold.parallel_core.topology import Axis


def piece_numbers(axis: Axis, split: Split, rank: int | None = None) -> list[int]:
    """Numbers, in the sequence's order, of the pieces that a rank holds; the default is this one.

    >>> piece_numbers(Axis("cp", 2, 1, (0, 1)), "zigzag")
    [1, 2]
    """
    num_pieces = 2 * axis.size if split == "zigzag" and axis.size > 1 else axis.size
    mine = held(num_pieces, axis.size, axis.rank if rank is None else rank, split)
    return [number for stretch in mine for number in stretch]


def gather_pieces(x: Tensor, axis: Axis, split: Split) -> Tensor:
    """One value of each piece, from all ranks, in the sequence's order.

    Args:
        x: (N, ...), of the pieces here.
        axis: the ranks that split the sequence.
        split: how.

    Returns:
        (A, ...); backward sums every rank's gradient of a piece where the piece is.
    """
    order = [number for rank in range(axis.size) for number in piece_numbers(axis, split, rank)]
    whole = all_gather(x, axis, 0)
    places = torch.tensor(order, device=x.device).argsort()
    return whole if order == sorted(order) else whole.index_select(0, places)


def from_before(x: Tensor, axis: Axis, split: Split) -> Tensor:
    """For each piece here, the value of the piece before it in the sequence.

    Each value goes to the one rank that needs it, and its gradient comes back.

    Args:
        x: (N, ...), of the pieces here.
        axis: the ranks that split the sequence.
        split: how.

    Returns:
        (N, ...); zeros for the first piece of the sequence.
    """
    owners = {n: r for r in range(axis.size) for n in piece_numbers(axis, split, r)}
    mine = piece_numbers(axis, split)
    # Rows leave in the order of the ranks they go to, and arrive in that of those they come from.
    leaving = sorted((owners[n + 1], n) for n in mine if n + 1 in owners)
    arriving = sorted((owners[n - 1], n - 1) for n in mine if n > 0)
    rows = x[[mine.index(n) for _, n in leaving]]
    sent, received = (_counts(way, axis.size) for way in (leaving, arriving))
    came = all_to_all(rows, received, sent, axis)
    # Out of what came and a row of zeros, on a rank to which nothing comes as well: in backward
    # every rank must send.
    numbers = [*(n for _, n in arriving), -1]
    return torch.cat((came, torch.zeros_like(x[:1])))[[numbers.index(n - 1) for n in mine]]


def _counts(rows: Sequence[tuple[int, int]], size: int) -> list[int]:
    """How many rows go to, or come from, each rank."""
    return [sum(rank == r for r, _ in rows) for rank in range(size)]


def halo(pieces: Sequence[Tensor], width: int, axis: Axis, split: Split) -> tuple[Tensor, ...]:
    """The last tokens before each piece here, as a causal convolution needs them.

    Args:
        pieces: (B, P/N, ...) each, in the order in which they are held.
        width: W, tokens to look back.
        axis: the ranks that split the sequence.
        split: how.

    Returns:
        (B, W, ...) for each piece; zeros before the sequence.

    Raises:
        ConfigError: a piece is shorter than that.
    """
    if pieces[0].shape[1] < width:
        raise ConfigError(
            f"{width} tokens before each piece of a sequence split {split} over {axis.name}="
            f"{axis.size}, whose pieces have {pieces[0].shape[1]}; use longer sequences or fewer "
            "ranks"
        )
    tails = torch.stack([piece[:, piece.shape[1] - width :] for piece in pieces])
    return from_before(tails, axis, split).unbind()


def incoming(decay: Tensor, state: Tensor, axis: Axis, split: Split) -> Tensor:
    """The state that comes into each piece here, of a recurrence that is linear in it.

    A piece turns a state h that comes in into ``decay`` · h + ``state``.

    Args:
        decay: (N, ...), the product of the tokens' decays; broadcast over the last dims of
            ``state``.
        state: (N, ...), with which each piece here ends when it starts from zero.
        axis: the ranks that split the sequence.
        split: how.

    Returns:
        Like ``state``: zero for the sequence's first piece.
    """
    whole = gather_pieces(torch.cat((decay.flatten(1), state.flatten(1)), 1), axis, split)
    sizes = [decay[0].numel(), state[0].numel()]
    decays, states = whole.split(sizes, 1)
    shape = decay.shape[1:] + (1,) * (state.dim() - decay.dim())
    carried = [torch.zeros_like(state[0])]
    for product, end in zip(decays[:-1], states[:-1], strict=True):
        carried.append(product.view(shape) * carried[-1] + end.view(state.shape[1:]))
    # Out of all of them, on the rank whose state is zero as well: in backward every rank must send.
    return torch.stack(carried)[piece_numbers(axis, split)]
