"""What a model remembers of the tokens so far, for generation.

A Mamba-2 layer remembers a state of fixed size; only attention layers keep keys and values, in
memory that is taken once. MLPs and experts remember nothing.

Legend: B sequences, S new tokens, T positions, K channels of the convolution, W its taps, H heads,
P width of a Mamba head, N length of its state, D width of an attention head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fivefold.hybrid_ssm.errors import HybridInputError


class MambaState:
    """The state of one Mamba-2 layer.

    Attributes:
        conv: the last inputs of the convolution (B, W - 1, K); None before the first token.
        ssm: (B, H, P, N), in float32 or wider; None before the first token.
    """

    def __init__(self) -> None:
        self.conv: Tensor | None = None
        self.ssm: Tensor | None = None


class KeyValues:
    """Keys and values of one attention layer, in memory taken once for ``max_length`` tokens."""

    def __init__(self, max_length: int):
        self.max_length = max_length
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, k_bshd: Tensor, v_bshd: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Put new tokens at position ``start``; returns those up to and with them (B, T, H, D)."""
        stop = start + k_bshd.shape[1]
        if self.keys is None or self.values is None:
            # Shaped by the first keys: a rank may hold only some of the heads.
            shape = (k_bshd.shape[0], self.max_length, *k_bshd.shape[2:])
            self.keys, self.values = k_bshd.new_empty(shape), v_bshd.new_empty(shape)
        self.keys[:, start:stop] = k_bshd
        self.values[:, start:stop] = v_bshd
        return self.keys[:, :stop], self.values[:, :stop]


class Snapshot(NamedTuple):
    """A point to roll back to: states, and how many tokens there were.

    Keys and values are not copied: those of earlier positions never change.
    """

    owner: "HybridCache"
    serial: int
    length: int
    states: dict[str, tuple[Tensor | None, Tensor | None]]


@dataclass(frozen=True)
class CacheBytes:
    """Memory of a cache.

    Attributes:
        states: of Mamba-2 layers; does not depend on length.
        keys_values: of attention layers, for all ``max_length`` tokens.
    """

    states: int
    keys_values: int


class HybridCache:
    """The memory of every layer of a model, and the number of tokens that it stands for.

    Args:
        max_length: longest sequence, prompt and new tokens together. Models without attention
            take any number of tokens whatever it is.

    Attributes:
        length: tokens so far, padding included.
        key_mask: (B, max_length), False at padding; None where there is none.
        states: of Mamba-2 layers, by the layer's name.
        attention: of attention layers, by the layer's name.
    """

    def __init__(self, max_length: int):
        if max_length < 1:
            raise HybridInputError(f"max_length is {max_length}; a cache holds at least 1 token")
        self.max_length = max_length
        self.length = 0
        self.key_mask: Tensor | None = None
        self.states: dict[str, MambaState] = {}
        self.attention: dict[str, KeyValues] = {}
        self._serial = 0
        self._live: dict[int, int] = {}

    def state(self, name: str) -> MambaState:
        """The state of the Mamba-2 layer called ``name``."""
        return self.states.setdefault(name, MambaState())

    def keys_values(self, name: str) -> KeyValues:
        """The keys and values of the attention layer called ``name``."""
        return self.attention.setdefault(name, KeyValues(self.max_length))

    def begin(self, num_tokens: int, mask_bs: Tensor | None, has_attention: bool) -> Tensor | None:
        """Make room for new tokens before a forward pass.

        Args:
            num_tokens: how many come.
            mask_bs: (B, num_tokens), False at padding among them; None for none.
            has_attention: whether the model has attention layers.

        Returns:
            The mask of all keys up to them (B, T), or None.

        Raises:
            HybridInputError: there is no room for them.
        """
        stop = self.length + num_tokens
        if has_attention and stop > self.max_length:
            raise HybridInputError(
                f"the cache has room for {self.max_length} tokens and holds {self.length}; "
                f"{num_tokens} more do not fit; make it with max_length={stop} or more"
            )
        if not has_attention:
            return None
        if mask_bs is not None and self.key_mask is None:
            shape = (mask_bs.shape[0], self.max_length)
            self.key_mask = mask_bs.new_ones(shape, dtype=torch.bool)
        if self.key_mask is None:
            return None
        self.key_mask[:, self.length : stop] = True if mask_bs is None else mask_bs
        return self.key_mask[:, :stop]

    def advance(self, num_tokens: int) -> None:
        """Count tokens that every layer has seen."""
        self.length += num_tokens

    def snapshot(self) -> Snapshot:
        """Remember this point; costs a copy of the states, whatever the length."""
        self._serial += 1
        self._live[self._serial] = self.length
        states = {
            name: (_clone(state.conv), _clone(state.ssm)) for name, state in self.states.items()
        }
        return Snapshot(self, self._serial, self.length, states)

    def rollback(self, snapshot: Snapshot) -> None:
        """Go back to a point, which may be gone back to again.

        Raises:
            HybridInputError: it is of another cache, or was taken on a branch that an earlier
                rollback left.
        """
        if snapshot.owner is not self or snapshot.serial not in self._live:
            raise HybridInputError(
                f"this snapshot, after {snapshot.length} tokens, is not of this cache's history "
                f"of {self.length} tokens: it is another cache's, or of a branch that a rollback "
                "left; fork() keeps a branch"
            )
        # What was written after this point on the abandoned branch will be written over.
        self._live = {
            serial: length for serial, length in self._live.items() if serial <= snapshot.serial
        }
        self.length = snapshot.length
        for name, state in self.states.items():
            conv, ssm = snapshot.states.get(name, (None, None))
            state.conv, state.ssm = _clone(conv), _clone(ssm)

    def fork(self, max_length: int | None = None, rows: Tensor | None = None) -> "HybridCache":
        """An independent copy.

        Args:
            max_length: of the copy; the default is the same.
            rows: which sequences, in which order (several times for beams); the default is all.

        Raises:
            HybridInputError: ``max_length`` is less than what there is.
        """
        copy = HybridCache(self.max_length if max_length is None else max_length)
        if self.attention and copy.max_length < self.length:
            raise HybridInputError(
                f"max_length={copy.max_length} is less than the {self.length} tokens of the cache"
            )
        take = _clone if rows is None else _taker(rows)
        copy.length = self.length
        for name, state in self.states.items():
            copy.state(name).conv, copy.state(name).ssm = take(state.conv), take(state.ssm)
        for name, kept in self.attention.items():
            if kept.keys is not None and kept.values is not None:
                old = (take(kept.keys[:, : self.length]), take(kept.values[:, : self.length]))
                if old[0] is not None and old[1] is not None:
                    copy.keys_values(name).append(old[0], old[1], 0)
        if self.key_mask is not None:
            old_mask = take(self.key_mask[:, : self.length])
            if old_mask is not None:
                copy.key_mask = old_mask.new_ones((old_mask.shape[0], copy.max_length))
                copy.key_mask[:, : self.length] = old_mask
        return copy

    def num_bytes(self) -> CacheBytes:
        """Bytes that the tensors take."""
        states = [t for state in self.states.values() for t in (state.conv, state.ssm)]
        kept = [t for pair in self.attention.values() for t in (pair.keys, pair.values)]
        return CacheBytes(_nbytes(states), _nbytes(kept))


def _nbytes(tensors: list[Tensor | None]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _clone(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def _taker(rows: Tensor) -> Callable[[Tensor | None], Tensor | None]:
    return lambda tensor: None if tensor is None else tensor.index_select(0, rows)
