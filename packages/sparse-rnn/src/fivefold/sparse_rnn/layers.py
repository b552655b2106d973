"""Recurrent layers as torch.nn has them, with a sparse recurrent matrix."""

from typing import Any, Literal, Self

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fivefold.sparse_rnn import inputs
from fivefold.sparse_rnn.errors import SparseRNNInputError
from fivefold.sparse_rnn.recurrent import SparseRecurrent


class SparseLSTM(SparseRecurrent):
    """``torch.nn.LSTM`` with a sparse recurrent matrix: same call, outputs and state dict.

    Args are torch's; ``density`` is the share of nonzeros, drawn at random. Use ``from_dense`` for
    weights that are there. ``proj_size`` other than 0 is refused.
    """

    dense_class = nn.LSTM

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, *args: Any, **kwargs: Any
    ):
        super().__init__("LSTM", input_size, hidden_size, num_layers, *args, **kwargs)

    def forward(
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """Outputs and the last (h, c), in the shapes of ``torch.nn.LSTM``."""
        call = inputs.read(input, self.input_size, self.batch_first)
        shape = self._state_shape(call)
        given_h, given_c = (None, None) if hx is None else hx
        h0 = inputs.state(call, given_h, shape, "h_0")
        c0 = inputs.state(call, given_c, shape, "c_0")
        y, h_n, c_n = self._run(call, h0, c0)
        return inputs.write(call, y), (h_n, c_n)


class SparseGRU(SparseRecurrent):
    """``torch.nn.GRU`` with a sparse recurrent matrix: same call, outputs and state dict.

    Args are torch's; ``density`` is the share of nonzeros, drawn at random. Use ``from_dense`` for
    weights that are there.
    """

    dense_class = nn.GRU

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, *args: Any, **kwargs: Any
    ):
        super().__init__("GRU", input_size, hidden_size, num_layers, *args, **kwargs)

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Outputs and the last h, in the shapes of ``torch.nn.GRU``."""
        return _forward(self, input, hx)


class SparseRNN(SparseRecurrent):
    """``torch.nn.RNN`` with a sparse recurrent matrix: same call, outputs and state dict.

    Args are torch's; ``density`` is the share of nonzeros, drawn at random. Use ``from_dense`` for
    weights that are there.
    """

    dense_class = nn.RNN

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: Literal["tanh", "relu"] = "tanh",
        *args: Any,
        **kwargs: Any,
    ):
        if nonlinearity not in ("tanh", "relu"):
            raise SparseRNNInputError(f"nonlinearity is {nonlinearity!r}; legal: 'tanh', 'relu'")
        mode = f"RNN_{nonlinearity.upper()}"
        super().__init__(mode, input_size, hidden_size, num_layers, *args, **kwargs)
        self.nonlinearity = nonlinearity

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Outputs and the last h, in the shapes of ``torch.nn.RNN``."""
        return _forward(self, input, hx)

    @classmethod
    def _like(cls, dense: nn.RNNBase, **options: Any) -> Self:
        nonlinearity = dense.mode.removeprefix("RNN_").lower()
        return super()._like(dense, nonlinearity=nonlinearity, **options)

    def _options(self) -> dict[str, Any]:
        return super()._options() | {"nonlinearity": self.nonlinearity}


def _forward(
    layer: SparseRecurrent, input: Tensor | PackedSequence, hx: Tensor | None
) -> tuple[Tensor | PackedSequence, Tensor]:
    """A call of a layer without a cell state."""
    call = inputs.read(input, layer.input_size, layer.batch_first)
    h0 = inputs.state(call, hx, layer._state_shape(call), "h_0")
    y, h_n, _ = layer._run(call, h0, None)
    return inputs.write(call, y), h_n
