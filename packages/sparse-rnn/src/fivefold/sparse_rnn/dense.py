"""Weights of torch's recurrent layers as they are found: plain, masked, or in a state dict.

Masks are those of ``torch.nn.utils.prune``: ``weight_hh_l0_orig`` and ``weight_hh_l0_mask`` in
place of ``weight_hh_l0``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fivefold.sparse_rnn.errors import SparseRNNInputError

NUM_GATES = {"RNN_TANH": 1, "RNN_RELU": 1, "LSTM": 4, "GRU": 3}
"""Gates of each ``mode``, as torch spells it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """A weight matrix and where it is not zero.

    Attributes:
        values: the dense matrix.
        mask: like values; true where a weight is, even if it happens to be zero.
    """

    values: Tensor
    mask: Tensor


def suffixes(num_layers: int, bidirectional: bool) -> Iterator[tuple[int, str]]:
    """Layer and ending of a parameter's name, in torch's order: l0, l0_reverse, l1 and so on."""
    for layer in range(num_layers):
        yield layer, f"l{layer}"
        if bidirectional:
            yield layer, f"l{layer}_reverse"


def find_weight(tensors: Mapping[str, Tensor], name: str) -> Weight | None:
    """A matrix by its name, masked or not; None where there is none.

    Args:
        tensors: by name, in torch's spelling or that of ``torch.nn.utils.prune``.
        name: such as ``weight_hh_l0``.
    """
    mask = tensors.get(f"{name}_mask")
    original = tensors.get(f"{name}_orig", tensors.get(name))
    if original is None:
        return None
    if mask is None:
        return Weight(values=original, mask=original != 0)
    if mask.shape != original.shape:
        raise SparseRNNInputError(
            f"{name} has shape {tuple(original.shape)} and its mask {tuple(mask.shape)}"
        )
    kept = mask != 0
    return Weight(values=torch.where(kept, original, 0), mask=kept)


def weight_of(module: nn.Module, name: str) -> Weight:
    """A matrix of a layer of torch, whatever has been laid over it.

    Parametrisations (``torch.nn.utils.parametrize``) give the matrix that they make.
    """
    held = {
        key: getattr(module, key) for key in (f"{name}_orig", f"{name}_mask") if _has(module, key)
    }
    found = find_weight(held if len(held) == 2 else {name: getattr(module, name)}, name)
    if found is None:
        raise SparseRNNInputError(f"{type(module).__name__} has no {name}")
    return Weight(values=found.values.detach(), mask=found.mask)


def _has(module: nn.Module, name: str) -> bool:
    return getattr(module, name, None) is not None
