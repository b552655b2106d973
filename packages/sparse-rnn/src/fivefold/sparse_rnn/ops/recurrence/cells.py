"""The four cells as arithmetic: how many gates, what is kept for the gradient.

Gates are stacked as in torch: i, f, g, o (LSTM); r, z, n (GRU, reset after the product).
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """What tells one cell from another.

    Attributes:
        number: by which C++ kernels know it.
        num_gates: rows of the recurrent matrix for one hidden unit.
        num_saved: values that a gradient needs of each unit and step, beside the outputs.
        has_memory: whether there is a cell state c beside h.
    """

    number: int
    num_gates: int
    num_saved: int
    has_memory: bool = False


CELLS = {
    "rnn_tanh": Cell(number=0, num_gates=1, num_saved=0),
    "rnn_relu": Cell(number=1, num_gates=1, num_saved=0),
    # i, f, g, o after their activations, and c.
    "lstm": Cell(number=2, num_gates=4, num_saved=5, has_memory=True),
    # r, z, n after their activations, and W_hn h + b_hn.
    "gru": Cell(number=3, num_gates=3, num_saved=4),
}
