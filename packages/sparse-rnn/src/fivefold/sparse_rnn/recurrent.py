"""What SparseRNN, SparseLSTM and SparseGRU share: layers, directions, dropout, dense twins.

Legend: T steps, B sequences, I input size, L layers, D directions, H hidden units, G gates.
"""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fivefold.sparse_rnn import inputs, pattern
from fivefold.sparse_rnn.dense import suffixes, weight_of
from fivefold.sparse_rnn.errors import SparseRNNInputError
from fivefold.sparse_rnn.inputs import Call
from fivefold.sparse_rnn.ops.recurrence import recurrence
from fivefold.sparse_rnn.pretrained import PretrainedWeights


class _KeepZeros(torch.autograd.Function):
    """A weight whose zeros get no gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return gradient * kept, None


class SparseRecurrent(PretrainedWeights):
    """What the three layers share; use one of them.

    Attributes:
        backend: what runs the recurrence, see ``fivefold.sparse_rnn.ops.recurrence``; None is the
            best there is.
    """

    def __init__(
        self,
        mode: str,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        density: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        _check(input_size, hidden_size, num_layers, dropout, proj_size)
        super().__init__(
            mode,
            (input_size, hidden_size, num_layers),
            bias=bias,
            bidirectional=bidirectional,
            density=density,
            device=device,
            dtype=dtype,
        )
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.proj_size = proj_size
        self.backend: str | None = None

    @classmethod
    def from_dense(cls, dense: nn.RNNBase, density: float | None = None) -> Self:
        """A sparse layer with the weights of a dense one.

        Args:
            dense: torch's layer; masks of ``torch.nn.utils.prune`` and parametrisations are
                followed. Zeros of ``weight_ih`` stay zero in training too.
            density: None keeps the nonzeros that are there; a number keeps so large a share of
                each recurrent matrix, the largest in magnitude.

        Raises:
            SparseRNNInputError: another class of layer, or one with projections.
        """
        if not isinstance(dense, cls.dense_class):
            raise SparseRNNInputError(
                f"{cls.__name__} is made from torch.nn.{cls.dense_class.__name__}, found "
                f"{type(dense).__name__}"
            )
        example = next(dense.parameters())
        sparse = cls._like(dense, device=example.device, dtype=example.dtype)
        for _, suffix in suffixes(dense.num_layers, dense.bidirectional):
            recurrent = weight_of(dense, f"weight_hh_{suffix}")
            mask = recurrent.mask
            if density is not None:
                mask = mask & pattern.largest_mask(recurrent.values, density)
            sparse.set_weight(f"weight_hh_{suffix}", recurrent.values, mask)
            first = weight_of(dense, f"weight_ih_{suffix}")
            sparse.set_kept_inputs(suffix, first.mask)
            names = {f"weight_ih_{suffix}": first.values}
            if dense.bias:
                names |= {n: getattr(dense, n) for n in (f"bias_ih_{suffix}", f"bias_hh_{suffix}")}
            with torch.no_grad():
                for name, tensor in names.items():
                    sparse.get_parameter(name).copy_(tensor)
        return sparse.train(dense.training)

    def to_dense(self) -> nn.RNNBase:
        """Torch's layer with the same weights, zeros and all."""
        example = next(self.parameters())
        options = self._options() | {"device": example.device, "dtype": example.dtype}
        make: Any = self.dense_class
        dense: nn.RNNBase = make(self.input_size, self.hidden_size, self.num_layers, **options)
        held = self.state_dict()
        dense.load_state_dict({k: v for k, v in held.items() if not k.endswith("_mask")})
        return dense.train(self.training)

    @classmethod
    def _like(cls, dense: nn.RNNBase, **options: Any) -> Self:
        make: Any = cls
        return make(
            dense.input_size,
            dense.hidden_size,
            dense.num_layers,
            bias=dense.bias,
            batch_first=dense.batch_first,
            dropout=dense.dropout,
            bidirectional=dense.bidirectional,
            density=0.0,
            **({"proj_size": dense.proj_size} if dense.proj_size else {}),
            **options,
        )

    def _options(self) -> dict[str, Any]:
        """Arguments of torch's layer beside its sizes."""
        return {
            "bias": self.bias,
            "batch_first": self.batch_first,
            "dropout": self.dropout,
            "bidirectional": self.bidirectional,
        }

    def _run(self, call: Call, h0: Tensor, c0: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs (T, B, D*H) and the last h and c (L*D, B, H)."""
        num_directions = 1 + self.bidirectional
        x_tbi, h_n, c_n = call.x, [], []
        for layer in range(self.num_layers):
            y: list[Tensor] = []
            for direction in range(num_directions):
                at = layer * num_directions + direction
                first_c = None if c0 is None else c0[at]
                out, h, c = self._run_one(call, x_tbi, layer, direction == 1, h0[at], first_c)
                y.append(out)
                h_n.append(h)
                c_n.append(c)
            x_tbi = y[0] if len(y) == 1 else torch.cat(y, -1)
            if layer + 1 < self.num_layers:
                x_tbi = F.dropout(x_tbi, self.dropout, self.training)
        return x_tbi, inputs.last(call, h_n), inputs.last(call, c_n) if c0 is not None else h_n[0]

    def _run_one(
        self, call: Call, x_tbi: Tensor, layer: int, reverse: bool, h0: Tensor, c0: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One layer in one direction."""
        suffix = f"l{layer}_reverse" if reverse else f"l{layer}"
        weight, kept = self.get_parameter(f"weight_ih_{suffix}"), self.kept_inputs(suffix)
        if kept is not None:
            weight = _KeepZeros.apply(weight, kept)
        bias, bias_n = self._biases(suffix)
        name = f"weight_hh_{suffix}"
        return recurrence(
            F.linear(x_tbi, weight, bias),
            h0,
            c0,
            self.get_parameter(name),
            *self.pattern_of(name),
            bias_n,
            cell=self.mode.lower(),
            lengths=call.lengths,
            reverse=reverse,
            backend=self.backend,
        )

    def _biases(self, suffix: str) -> tuple[Tensor | None, Tensor | None]:
        """What is added before the step (G*H,), and a GRU's bias beside the reset gate (H,)."""
        if not self.bias:
            return None, None
        first = self.get_parameter(f"bias_ih_{suffix}")
        second = self.get_parameter(f"bias_hh_{suffix}")
        if self.mode != "GRU":
            return first + second, None
        outer, inner = second.split([2 * self.hidden_size, self.hidden_size])
        return first + torch.cat([outer, torch.zeros_like(inner)]), inner

    def _state_shape(self, call: Call) -> tuple[int, int, int]:
        directions = self.num_layers * (1 + self.bidirectional)
        return directions, call.x.shape[1], self.hidden_size

    def extra_repr(self) -> str:
        """Sizes, what differs from the defaults, and the density."""
        defaults = {"bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        changed = [f"{k}={v}" for k, v in self._options().items() if v != defaults.get(k, v)]
        layers = [f"num_layers={self.num_layers}"] if self.num_layers != 1 else []
        sizes = [str(self.input_size), str(self.hidden_size)]
        return ", ".join([*sizes, *layers, *changed, f"density={self.density:.4g}"])


def _check(
    input_size: int, hidden_size: int, num_layers: int, dropout: float, proj_size: int
) -> None:
    sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers}
    for name, size in sizes.items():
        if size < 1:
            raise SparseRNNInputError(f"{name} is {size}; it must be at least 1")
    if not 0 <= dropout <= 1:
        raise SparseRNNInputError(f"dropout is {dropout}; it is a probability from 0 to 1")
    if proj_size:
        raise SparseRNNInputError(
            f"proj_size is {proj_size}; layers with projections are not sparse here, 0 is legal"
        )
