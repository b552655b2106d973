"""A nonzero as words of 32 bits: its column, as an offset in bytes, and its value.

Narrow: the offset in the low half, a float16 or bfloat16 in the high half; a value is had by a
shift, an offset by a mask. Wide: a word of offset and a word of float32, where values need it or
an offset would not fit in 16 bits.

Legend: N nonzeros.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fivefold.sparse_rnn.errors import SparseRNNInputError

_HALF = 1 << 16
_NARROW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Words:
    """Packed nonzeros.

    Attributes:
        words: int32, (N,) narrow or (N, 2) wide: offset, value.
        dtype: of the values: float16, bfloat16 or, always wide, float32.
        element_bytes: distance of two columns' states in memory.
    """

    words: Tensor
    dtype: torch.dtype
    element_bytes: int

    @property
    def wide(self) -> bool:
        """Whether a nonzero takes two words."""
        return self.words.dim() == 2


def pack(
    values: Tensor, col: Tensor, *, element_bytes: int, dtype: torch.dtype | None = None
) -> Words:
    """Pack nonzeros; values are rounded to the nearest of ``dtype``.

    Args:
        values: (N,).
        col: (N,), their columns.
        element_bytes: distance of two columns' states in memory.
        dtype: float16, bfloat16 or float32; the default is that of ``values``, which loses nothing.

    Raises:
        SparseRNNInputError: another dtype, or values that are finite and would not be so in
            ``dtype``.
    """
    dtype = values.dtype if dtype is None else dtype
    if dtype not in (*_NARROW, torch.float32):
        raise SparseRNNInputError(
            f"values were asked to be packed as {dtype}; legal: float16, bfloat16, float32"
        )
    rounded = values.detach().to(dtype)
    _check_range(values, rounded)
    offset = col.to(torch.int64) * element_bytes
    last = int(offset.max()) if offset.numel() else 0
    if last >= 1 << 31:
        raise SparseRNNInputError(
            f"column {int(col.max())} of {element_bytes} bytes lies {last} bytes in; "
            "offsets have 31 bits"
        )
    if dtype in _NARROW and last < _HALF:
        bits = rounded.view(torch.int16).to(torch.int64) << 16
        return Words(words=_int32(bits | offset), dtype=dtype, element_bytes=element_bytes)
    bits = rounded.to(torch.float32).view(torch.int32)
    words = torch.stack([offset.to(torch.int32), bits], -1)
    return Words(words=words, dtype=dtype, element_bytes=element_bytes)


def unpack(packed: Words) -> tuple[Tensor, Tensor]:
    """Values (N,) and columns (N,) int32, bit for bit what was packed."""
    if packed.wide:
        offset, bits = packed.words.unbind(-1)
        values = bits.contiguous().view(torch.float32).to(packed.dtype)
        return values, offset // packed.element_bytes
    whole = packed.words.to(torch.int64)
    values = (whole >> 16).to(torch.int16).view(packed.dtype)
    return values, ((whole & (_HALF - 1)) // packed.element_bytes).to(torch.int32)


def _check_range(values: Tensor, rounded: Tensor) -> None:
    lost = values.isfinite() & ~rounded.isfinite()
    if bool(lost.any()):
        worst = float(values[lost].abs().max())
        raise SparseRNNInputError(
            f"{int(lost.sum())} values are too large for {rounded.dtype}, up to {worst:g} where it "
            f"ends at {torch.finfo(rounded.dtype).max:g}: pack them as bfloat16 or float32"
        )


def _int32(words: Tensor) -> Tensor:
    """The low 32 bits of int64."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
