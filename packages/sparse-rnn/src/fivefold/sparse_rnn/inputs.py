"""What a recurrent layer is called with, in one form: time first, a batch, lengths or none.

Legend: T steps, B sequences, I input size, L layers, D directions, H hidden units.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fivefold.sparse_rnn.errors import SparseRNNInputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A call of a layer.

    Attributes:
        x: (T, B, I).
        lengths: (B,) where sequences differ in length, on the device of x.
        packed: what was given, where that was a packed sequence.
        batched: whether it had a batch.
        batch_first: whether the batch came first.
    """

    x: Tensor
    lengths: Tensor | None
    packed: PackedSequence | None
    batched: bool
    batch_first: bool


def read(input: Tensor | PackedSequence, input_size: int, batch_first: bool) -> Call:
    """Bring an input into the one form.

    Raises:
        SparseRNNInputError: it has no such size, or no steps.
    """
    if isinstance(input, PackedSequence):
        x, lengths = pad_packed_sequence(input)
        _check_size(input.data, input_size)
        # Equal lengths are no lengths: the common case stays the fast one.
        ragged = lengths.to(x.device) if int(lengths.min()) < x.shape[0] else None
        return Call(x=x, lengths=ragged, packed=input, batched=True, batch_first=False)
    if input.dim() not in (2, 3):
        raise SparseRNNInputError(
            f"input has shape {tuple(input.shape)}; it must have 2 dims (steps, {input_size}), or "
            "3 with a batch"
        )
    _check_size(input, input_size)
    batched = input.dim() == 3
    x = input if batched else input.unsqueeze(1)
    x = x.transpose(0, 1) if batched and batch_first else x
    if x.shape[0] == 0:
        raise SparseRNNInputError(
            f"input of shape {tuple(input.shape)} has no steps; give 1 or more"
        )
    return Call(x=x, lengths=None, packed=None, batched=batched, batch_first=batch_first)


def write(call: Call, y: Tensor) -> Tensor | PackedSequence:
    """Bring an output (T, B, D*H) into the form that the input had."""
    if call.packed is not None:
        return _pack(call.packed, y)
    if not call.batched:
        return y.squeeze(1)
    return y.transpose(0, 1) if call.batch_first else y


def state(call: Call, given: Tensor | None, shape: tuple[int, int, int], name: str) -> Tensor:
    """A first state as (L*D, B, H): what was given, or zeros.

    Raises:
        SparseRNNInputError: it has another shape.
    """
    if given is None:
        return torch.zeros(shape, dtype=call.x.dtype, device=call.x.device)
    wanted = shape if call.batched else (shape[0], shape[2])
    if tuple(given.shape) != wanted:
        raise SparseRNNInputError(f"{name} has shape {tuple(given.shape)} instead of {wanted}")
    return given if call.batched else given.unsqueeze(1)


def last(call: Call, states: list[Tensor]) -> Tensor:
    """Last states of all layers and directions, in the form that first ones have."""
    return torch.stack(states) if call.batched else torch.stack(states).squeeze(1)


def _pack(packed: PackedSequence, y: Tensor) -> PackedSequence:
    sizes = packed.batch_sizes
    lengths = (sizes.unsqueeze(0) > torch.arange(y.shape[1]).unsqueeze(1)).sum(1)
    order = packed.sorted_indices
    in_order = y if order is None else y.index_select(1, order)
    data = pack_padded_sequence(in_order, lengths).data
    return PackedSequence(data, sizes, order, packed.unsorted_indices)


def _check_size(x: Tensor, input_size: int) -> None:
    if x.shape[-1] != input_size:
        raise SparseRNNInputError(
            f"input has {x.shape[-1]} values a step in shape {tuple(x.shape)}; this layer takes "
            f"{input_size}"
        )
