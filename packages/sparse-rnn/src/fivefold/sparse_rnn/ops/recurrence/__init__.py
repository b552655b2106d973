"""A recurrent layer's loop over time with a sparse recurrent matrix."""

from torch import Tensor

from fivefold.sparse_rnn.ops.recurrence import op

__all__ = ["recurrence"]


def recurrence(
    gates: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias_n: Tensor | None = None,
    *,
    cell: str,
    lengths: Tensor | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """All steps of one layer in one direction, with gradients on the nonzeros only.

    A step computes the cell's gates from ``gates[t] + W h`` as torch.nn does, where W (G*H, H) is
    given by its nonzeros. States are kept in at least float32 from step to step. The loop with
    weights that stay on chip is that of Zhu et al., arXiv 1804.10223.

    Args:
        gates: (T, B, G*H), the input's part of the gates: W_ih x and every bias that can be added
            before the step.
        h0: (B, H).
        c0: (B, H) for "lstm", else None.
        values: (N,), the nonzeros of W, row by row and by rising column in a row.
        crow: (G*H + 1,) int32, where rows begin in ``values``.
        col: (N,) int32, the columns. Neither is changed as long as it is in use.
        bias_n: (H,) for "gru" only, the bias inside the product with the reset gate; the default
            is zeros.
        cell: "rnn_tanh", "rnn_relu", "lstm" or "gru".
        lengths: (B,) int64, steps of each sequence; the default is T. Later outputs are 0.
        reverse: from each sequence's last step to its first.
        backend: the default is the best there is.

    Returns:
        y (T, B, H), the last h (B, H), and the last c (B, H), empty (0,) without a cell state.

    Raises:
        KernelInputError: the shapes do not fit together.
    """
    return op.apply(gates, h0, c0, values, crow, col, bias_n, lengths, cell, reverse, backend)
