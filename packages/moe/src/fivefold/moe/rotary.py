"""Rotary position embedding: rotates pairs of a head's values by an angle of the position.

Legend: B sequences, S positions here, D width of a head, R width of its part that is rotated.
"""

import torch
from torch import Tensor, nn

from fivefold.kernels import rotary
from fivefold.parallel_core.documents import Documents


class Positions(nn.Module):
    """Positions of the tokens that this rank holds; the seam that splits of a sequence swap."""

    def forward(self, length: int, device: torch.device) -> Tensor:
        """Positions of ``length`` tokens, integers (S,)."""
        return torch.arange(length, device=device)


class Rotary:
    """The rotation of one forward pass, for queries and keys of every layer.

    The angles are computed when the first layer asks, because only there the number of
    positions is known (a rank may hold a part of the sequence between layers), and are kept for
    the layers after it.

    Args:
        positions: gives the positions of the tokens here.
        start: position of the first token, above 0 with a cache.
        rotary_dim: R.
        theta: base of the wavelengths.
        documents: packed in each sequence; positions count from the start of each.
    """

    def __init__(
        self,
        positions: nn.Module,
        start: int,
        rotary_dim: int,
        theta: float,
        documents: Documents | None = None,
    ):
        self.positions = positions
        self.start = start
        self.rotary_dim = rotary_dim
        self.theta = theta
        self.documents = documents
        self._tables: tuple[Tensor, Tensor] | None = None

    def __call__(self, x_bshd: Tensor) -> Tensor:
        """Rotate queries or keys (B, S, heads, D)."""
        if self._tables is None:
            self._tables = self._compute(x_bshd)
        return rotary(x_bshd, *self._tables)

    def _compute(self, x_bshd: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (S, R/2), from float32 angles as transformers has.

        With packed documents every sequence has its own, (B, S, R/2).
        """
        positions = self.positions(x_bshd.shape[1], x_bshd.device) + self.start
        if self.documents is not None:
            positions = self.documents.positions(positions)
        # On the CPU whatever the device: models were trained with these very float32 values, and
        # another device's power function differs in the last bit.
        steps = torch.arange(0, self.rotary_dim, 2, dtype=torch.float32, device="cpu")
        frequencies = 1.0 / self.theta ** (steps / self.rotary_dim)
        angles = positions[..., None].float() * frequencies.to(x_bshd.device)
        dtype = torch.promote_types(x_bshd.dtype, torch.float32)
        return angles.cos().to(dtype), angles.sin().to(dtype)
