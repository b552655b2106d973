"""Sparse recurrent layers that keep their nonzeros on chip (arXiv 1804.10223)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fivefold.sparse_rnn.errors import (
    SparseRNNError,
    SparseRNNFileError,
    SparseRNNInputError,
    SparseRNNTimeoutError,
)

if TYPE_CHECKING:
    from fivefold.sparse_rnn.layers import SparseGRU, SparseLSTM, SparseRNN

__all__ = [
    "SparseGRU",
    "SparseLSTM",
    "SparseRNN",
    "SparseRNNError",
    "SparseRNNFileError",
    "SparseRNNInputError",
    "SparseRNNTimeoutError",
]


def __getattr__(name: str) -> Any:
    # The layers import torch, which --help of the command must not.
    if name in ("SparseGRU", "SparseLSTM", "SparseRNN"):
        return getattr(import_module("fivefold.sparse_rnn.layers"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
