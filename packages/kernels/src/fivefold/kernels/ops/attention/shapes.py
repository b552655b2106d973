"""What fits together, and the one layout that the backends see.

The leading dims become two: B, over which the bias differs, and R, over which it is broadcast. So
a pair bias that all rows of an alignment share stays as small as it is, in memory and in its
gradient.

Legend: B batch, R rows that share a bias, H query heads, G key heads, Tq queries, Tk keys.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fivefold.kernels.errors import KernelInputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The causal band as users say it; see ``attention``."""

    is_causal: bool
    causal_offset: int
    window: int | None

    def band(self) -> tuple[int | None, int | None]:
        """Start and end: query i sees keys from i + start to i + end, where None is no bound."""
        if not self.is_causal:
            return None, None
        start = None if self.window is None else self.causal_offset - self.window + 1
        return start, self.causal_offset


class Leading:
    """Which leading dims are B and which are R.

    Args:
        lead: sizes of the leading dims.
        bias: what decides; without one all are B.
    """

    def __init__(self, lead: torch.Size, bias: Tensor | None):
        self._lead = lead
        dims = range(len(lead))
        own = lead if bias is None else _padded(bias, len(lead) + 3).shape[: len(lead)]
        rows = [d for d in dims if own[d] == 1 and lead[d] != 1]
        batch = [d for d in dims if d not in rows]
        self._order = (*batch, *rows)
        self._folded = math.prod([lead[d] for d in batch]), math.prod([lead[d] for d in rows])

    def fold(self, x: Tensor) -> Tensor:
        """(*leading, ...) to (B, R, ...), a view where one or two leading dims are not 1."""
        rest = range(len(self._lead), x.dim())
        return x.permute(*self._order, *rest).reshape(*self._folded, *x.shape[len(self._lead) :])

    def fold_bias(self, bias: Tensor) -> Tensor:
        """A bias to (B, H or 1, Tq or 1, Tk or 1)."""
        bias = _padded(bias, len(self._lead) + 3)
        bias = bias.permute(*self._order, *range(len(self._lead), bias.dim()))
        return bias.reshape(self._folded[0], *bias.shape[-3:])

    def fold_mask(self, mask: Tensor, num_keys: int) -> Tensor:
        """A mask of keys to (B, R, Tk)."""
        return self.fold(mask.expand(*self._lead, num_keys))

    def unfold(self, x: Tensor) -> Tensor:
        """(B, R, ...) back to (*leading, ...)."""
        rest = range(len(self._lead), len(self._lead) + x.dim() - 2)
        back = sorted(range(len(self._order)), key=self._order.__getitem__)
        lead = (self._lead[d] for d in self._order)
        return x.reshape(*lead, *x.shape[2:]).permute(*back, *rest)


def rows_of(x: Tensor) -> Tensor:
    """(B, R, heads, T, width) to (N, heads, T, width) whose values lie side by side.

    A view, except of memory in an order that no model has.
    """
    x = x.flatten(0, 1)
    return x if x.stride(-1) == 1 else x.contiguous()


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    options: Options,
) -> None:
    """Raise ``KernelInputError`` unless all of it fits together."""
    _check_operands(query, key, value)
    scores = (*query.shape[:-1], key.shape[-2])
    if bias is not None:
        if not bias.is_floating_point():
            raise KernelInputError(
                f"attention takes a floating-point bias, found {bias.dtype}: give a mask of keys "
                "as key_mask, and any other as torch.where(mask, 0.0, -torch.inf)"
            )
        _check_broadcast("bias", bias, scores)
    if key_mask is not None:
        if key_mask.dtype != torch.bool:
            raise KernelInputError(f"attention takes a bool key_mask, found {key_mask.dtype}")
        _check_broadcast("key_mask", key_mask, (*query.shape[:-3], key.shape[-2]))
    _check_options(options)


def _check_operands(query: Tensor, key: Tensor, value: Tensor) -> None:
    found = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not query.is_floating_point() or not query.dtype == key.dtype == value.dtype:
        raise KernelInputError(
            "attention takes query, key and value of one floating-point dtype, found "
            f"{query.dtype}, {key.dtype} and {value.dtype}"
        )
    if min(query.dim(), key.dim(), value.dim()) < 3:
        raise KernelInputError(f"attention takes operands (..., heads, length, width): {found}")
    if query.shape[:-3] != key.shape[:-3] or key.shape[:-1] != value.shape[:-1]:
        raise KernelInputError(
            f"attention takes equal leading dims, and a value for every key, found {found}"
        )
    if query.shape[-1] != key.shape[-1] or 0 in (query.shape[-1], value.shape[-1]):
        raise KernelInputError(
            f"attention takes query and key of one width, and no widths of 0, found {found}"
        )
    heads, shared = query.shape[-3], key.shape[-3]
    if not heads or not shared or heads % shared:
        raise KernelInputError(
            f"attention takes a number of query heads that the number of key heads divides, found "
            f"{heads} and {shared}"
        )


def _check_broadcast(name: str, x: Tensor, target: tuple[int, ...]) -> None:
    # Not `in`: torch.compile takes a number for no member where the members are symbols.
    fits = x.dim() <= len(target) and all(
        size == 1 or size == wanted
        for size, wanted in zip(reversed(x.shape), reversed(target), strict=False)
    )
    if not fits:
        raise KernelInputError(
            f"attention takes a {name} that broadcasts to {target}, found {tuple(x.shape)}"
        )


def _check_options(options: Options) -> None:
    if not options.is_causal and (options.causal_offset or options.window is not None):
        raise KernelInputError(
            "attention was asked for causal_offset or window without is_causal=True, found "
            f"causal_offset={options.causal_offset}, window={options.window}"
        )
    if options.window is not None and options.window < 1:
        raise KernelInputError(f"attention takes a window of at least 1, found {options.window}")


def _padded(x: Tensor, dim: int) -> Tensor:
    return x.reshape((1,) * (dim - x.dim()) + x.shape)
