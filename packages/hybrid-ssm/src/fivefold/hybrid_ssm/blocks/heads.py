"""The parameters of a Mamba-2 layer that belong to its heads and groups.

Legend: H heads, K channels (of x, then of B and C), W taps.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fivefold.hybrid_ssm.config import HybridConfig
from fivefold.hybrid_ssm.precision import KeepsFloat32


@dataclass(frozen=True, slots=True)
class HeadValues:
    """The parameters of the heads that a rank computes, as the scan takes them.

    Attributes:
        weights: taps of the channels of x, B and C, each (K, W).
        biases: of the same, each (K,), or None.
        decay: A, (H,), negative, in float32 or wider.
        skip: D, (H,).
        dt_bias: (H,).
    """

    weights: tuple[Tensor, Tensor, Tensor]
    biases: tuple[Tensor | None, Tensor | None, Tensor | None]
    decay: Tensor
    skip: Tensor
    dt_bias: Tensor
    _joined: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)

    def joined(self) -> tuple[Tensor, Tensor | None]:
        """Taps (K, W) and biases (K,) of all channels; made once."""
        if not self._joined:
            bias = None if self.biases[0] is None else torch.cat(self.biases)  # type: ignore[arg-type]
            self._joined.append((torch.cat(self.weights), bias))
        return self._joined[0]


class Taps(nn.Module):
    """Taps and bias of some channels of the depthwise convolution."""

    def __init__(self, num_channels: int, width: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_channels, width))
        self.bias = nn.Parameter(torch.empty(num_channels)) if bias else None


class Heads(KeepsFloat32):
    """The parameters that belong to heads and groups; a rank may hold some of them.

    All are split along their first dim.
    """

    wide = ("A_log", "D", "dt_bias")

    def __init__(self, config: HybridConfig):
        super().__init__()
        num_shared = config.num_groups * config.state_size
        widths = {"conv_x": config.mamba_width, "conv_b": num_shared, "conv_c": num_shared}
        for name, width in widths.items():
            self.add_module(name, Taps(width, config.conv_width, config.use_conv_bias))
        self.A_log = nn.Parameter(torch.empty(config.num_mamba_heads))
        self.D = nn.Parameter(torch.empty(config.num_mamba_heads))
        self.dt_bias = nn.Parameter(torch.empty(config.num_mamba_heads))
        self._kept: tuple[object, HeadValues] | None = None

    def forward(self) -> HeadValues:
        """The values of this rank's heads.

        Without gradients they are kept until a parameter changes: a decoded token is so little
        work that making them anew would show.
        """
        if torch.is_grad_enabled():
            return self._values()
        state = tuple((p.data_ptr(), p._version, p.dtype) for p in self.parameters())
        if self._kept is None or self._kept[0] != state:
            self._kept = (state, self._values())
        return self._kept[1]

    def _values(self) -> HeadValues:
        x, b, c = (self.get_submodule(f"conv_{name}") for name in "xbc")
        wide = torch.promote_types(self.A_log.dtype, torch.float32)
        return HeadValues(
            weights=(x.weight, b.weight, c.weight),  # type: ignore[arg-type]
            biases=(x.bias, b.bias, c.bias),  # type: ignore[arg-type]
            decay=-self.A_log.to(wide).exp(),
            skip=self.D.to(wide),
            dt_bias=self.dt_bias.to(wide),
        )
