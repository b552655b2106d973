"""Layers that all of the network is made of: linear, layer norm, gated attention, transition.

Legend: any leading dims, T positions that attend to each other, H heads, D width of a head,
C channels.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fivefold import kernels
from fivefold.kernels import attention, layer_norm

Init = Literal["linear", "relu", "glorot", "gate", "zero"]
Bias = Tensor | Callable[[], Tensor] | None
"""What is added to scores; a function gives it when it is needed, which may be some time off."""


class Linear(kernels.Linear):
    """A linear layer that begins as the supplement says (section 1.11.4).

    Args:
        c_in: channels of the input.
        c_out: channels of the output.
        bias: whether it has one; 0 at first, and 1 where ``init`` is "gate".
        init: "linear" keeps the variance, "relu" keeps it before a ReLU, "glorot" that of
            attention's projections, "gate" begins open and "zero" adds nothing.
    """

    def __init__(self, c_in: int, c_out: int, bias: bool = True, init: Init = "linear"):
        self.init: Init = init
        super().__init__(c_in, c_out, bias)

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        with torch.no_grad():
            fill(self.weight, self.init)
            if self.bias is not None:
                self.bias.fill_(1.0 if self.init == "gate" else 0.0)


def fill(weight: Tensor, init: Init, num_outputs: int | None = None) -> None:
    """Draw a weight (out, in); ``num_outputs`` counts where several matrices are one tensor."""
    num_out, num_in = weight.shape
    if init in ("gate", "zero"):
        weight.zero_()
    elif init == "glorot":
        limit = math.sqrt(6 / (num_in + (num_outputs or num_out)))
        weight.uniform_(-limit, limit)
    else:
        scale = 2.0 if init == "relu" else 1.0
        # A normal distribution cut at two deviations has 0.87962566 of its deviation left.
        deviation = math.sqrt(scale / num_in) / 0.87962566103423978
        nn.init.trunc_normal_(weight, std=deviation, a=-2 * deviation, b=2 * deviation)


class LayerNorm(nn.Module):
    """Layer norm over the channels, of rows that may lie anywhere in memory.

    Args:
        channels: size of the last dim.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def reset_parameters(self) -> None:
        """Begin as the identity of normalised rows."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Like x, without gaps in memory."""
        return layer_norm(x, self.weight.shape, self.weight, self.bias)


class AttentionCore(nn.Module):
    """Scores, softmax and values: the seam where attention may be done in another way."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        key_mask: Tensor | None,
    ) -> Tensor:
        """Attend.

        Args:
            query: (..., H, T, D)
            key: (..., H, T, D)
            value: (..., H, T, D)
            bias: added to scores, broadcastable to (..., H, T, T).
            key_mask: (..., T) bool; None where all may be attended.
        """
        return attention(query, key, value, bias, key_mask=key_mask)


class Attention(nn.Module):
    """Gated self-attention of ``num_heads`` heads with one projection for all that it needs.

    Args:
        channels: of input and output.
        num_heads: H.
        head_width: D.
    """

    def __init__(self, channels: int, num_heads: int, head_width: int):
        super().__init__()
        self.num_heads = num_heads
        inner = num_heads * head_width
        self.linear_qkvg = QKVG(channels, inner)
        self.gate_bias = nn.Parameter(torch.ones(inner))
        self.linear_o = Linear(inner, channels, init="zero")
        self.core = AttentionCore()

    def reset_parameters(self) -> None:
        """Gates begin open."""
        nn.init.ones_(self.gate_bias)

    def forward(self, x: Tensor, bias: Bias, key_mask: Tensor | None) -> Tensor:
        """Attend along the second last dim of x (..., T, C); bias and mask as ``AttentionCore``."""
        qkvg = self.linear_qkvg(x).unflatten(-1, (4, self.num_heads, -1))
        query, key, value, gate = (y.transpose(-2, -3) for y in qkvg.unbind(-3))
        bias = bias() if callable(bias) else bias
        out = self.core(query, key, value, bias, key_mask).transpose(-2, -3).flatten(-2)
        return self.linear_o(
            out * torch.sigmoid(gate.transpose(-2, -3).flatten(-2) + self.gate_bias)
        )


class QKVG(kernels.Linear):
    """Queries, keys, values and gates in one product, in this order along the output.

    Args:
        channels: of the input.
        inner: channels of each of the four.
    """

    def __init__(self, channels: int, inner: int):
        self.inner = inner
        super().__init__(channels, 4 * inner, bias=False)

    def reset_parameters(self) -> None:
        """Queries, keys and values as Glorot and Bengio say; gates at 0."""
        with torch.no_grad():
            for part in self.weight[: 3 * self.inner].chunk(3):
                fill(part, "glorot")
            self.weight[3 * self.inner :].zero_()


class Transition(nn.Module):
    """Two layers at each position (supplement, algorithms 9 and 15).

    Args:
        channels: of input and output.
        factor: by which the middle is wider.
    """

    def __init__(self, channels: int, factor: int):
        super().__init__()
        self.layer_norm = LayerNorm(channels)
        self.linear_1 = Linear(channels, factor * channels, init="relu")
        self.linear_2 = Linear(factor * channels, channels, init="zero")

    def forward(self, x: Tensor, chunk_size: int | None = None) -> Tensor:
        """The update of x (..., I, T, C), for ``chunk_size`` of the I at a time."""
        return in_chunks(self._rows, (x,), chunk_size)

    def _rows(self, x: Tensor) -> Tensor:
        # In place: the widest activation of a block need not exist twice.
        return self.linear_2(F.relu(self.linear_1(self.layer_norm(x)), inplace=True))


class SharedDropout(nn.Module):
    """Dropout whose mask is the same all along one dim (supplement, section 1.11.6).

    Args:
        rate: of what is dropped.
        dim: along which the mask is shared: -3 for "row-wise", -2 for "column-wise".
    """

    def __init__(self, rate: float, dim: int):
        super().__init__()
        self.rate = rate
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """The x in evaluation, and with parts zeroed and the rest scaled up in training."""
        if not self.training or self.rate == 0:
            return x
        shape = list(x.shape)
        shape[self.dim] = 1
        return x * F.dropout(x.new_ones(shape), self.rate)


def in_chunks(
    function: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], size: int | None
) -> Tensor:
    """``function`` of slices of inputs (..., I, T, C) along I, joined; bounds what it allocates.

    Args:
        function: of as many tensors as there are inputs; returns (..., I, T, C').
        inputs: cut along their third last dim; None stays None.
        size: of a slice; None is everything at once.
    """
    total = next(x.shape[-3] for x in inputs if x is not None)
    if size is None or size >= total:
        return function(*inputs)
    starts = range(0, total, size)
    parts = [
        function(*(None if x is None else x[..., start : start + size, :, :] for x in inputs))
        for start in starts
    ]
    return torch.cat(parts, -3)
