"""Sparse recurrent layers that keep their nonzeros on chip (arXiv 1804.10223)."""

from fivefold.sparse_rnn.errors import SparseRNNError, SparseRNNFileError, SparseRNNInputError
from fivefold.sparse_rnn.layers import SparseGRU, SparseLSTM, SparseRNN

__all__ = [
    "SparseGRU",
    "SparseLSTM",
    "SparseRNN",
    "SparseRNNError",
    "SparseRNNFileError",
    "SparseRNNInputError",
]
