"""The errors of this package: one base, one subclass per thing that can be wrong."""


class SparseRNNError(Exception):
    """Base of every error that fivefold.sparse_rnn raises on purpose."""


class SparseRNNInputError(SparseRNNError, ValueError):
    """Sizes, tensors or options that cannot be, with what would be legal."""


class SparseRNNFileError(SparseRNNError, ValueError):
    """A file that is missing, damaged or of another layer."""


class SparseRNNTimeoutError(SparseRNNError, RuntimeError):
    """A kernel on a GPU gave up waiting for another block; its results are NaN."""
