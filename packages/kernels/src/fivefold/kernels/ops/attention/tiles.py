"""How the kernels of ``attention`` cut their work: sizes of tiles by width, dtype and tensor cores.

Chosen so that nothing spills and shared memory holds the stages. Where tensor cores take operands
from registers, those leave less room for sums than on a Hopper.
"""

from dataclasses import dataclass
from math import ceil, prod

import torch

from fivefold.kernels.launch import TensorCores
from fivefold.kernels.sizes import next_power_of_2

WIDEST = 256


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries and keys of a tile, warps of a program, stages of its pipeline."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int

    def constants(self) -> dict[str, int]:
        """As ``launch`` takes them."""
        return {
            "QUERIES": self.queries,
            "KEYS": self.keys,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


@dataclass(frozen=True, slots=True)
class Walk:
    """The bias's gradient: tiles that own a part of it, and tiles of scores that each sums.

    Attributes:
        owners: how many tiles the bias has.
        steps: how many tiles of scores share each of them.
        sums: whether the bias is broadcast over heads, queries and keys.
    """

    owners: int
    steps: int
    sums: tuple[bool, bool, bool]

    def splits(self, num_sms: int) -> int:
        """Into how many parts a sum is cut so that the device has enough programs."""
        return max(1, min(self.steps, ceil(4 * num_sms / max(1, self.owners))))

    def constants(self) -> dict[str, bool]:
        """As ``launch`` takes them."""
        return dict(zip(("SUM_HEADS", "SUM_QUERIES", "SUM_KEYS"), self.sums, strict=True))


def forward(num_queries: int, width: int, dtype: torch.dtype, cores: TensorCores) -> Tile:
    """Of the kernel that makes results."""
    if dtype.itemsize > 2:
        tile = Tile(64 if width <= 32 else 32 if width <= 64 else 16, 32, 4, 2)
    elif width > 128:
        tile = Tile(128, 32, 8, 2)
    elif width > 64 or (width > 32 and cores is TensorCores.REGISTERS):
        tile = Tile(128, 64, 8, 3)
    else:
        tile = Tile(128, 64, 4, 3)
    return _no_more_queries(tile, num_queries)


def dquery(num_queries: int, width: int, dtype: torch.dtype, cores: TensorCores) -> Tile:
    """Of the kernel that makes the gradient of queries."""
    if dtype.itemsize > 2:
        narrow = 32 if width <= 32 else 16
        tile = Tile(narrow, 32 if width <= 64 else 16, 4 if width <= 64 else 8, 1)
    elif width > 128:
        tile = Tile(64, 32, 8, 2)
    elif width > 64:
        tile = Tile(128, 32 if cores is TensorCores.REGISTERS else 64, 8, 2)
    else:
        tile = Tile(128, 64, 8, 3)
    return _no_more_queries(tile, num_queries)


def dkey(num_keys: int, width: int, dtype: torch.dtype, cores: TensorCores) -> Tile:
    """Of the kernel that makes the gradients of keys and values."""
    in_registers = cores is TensorCores.REGISTERS
    if dtype.itemsize > 2:
        tile = Tile(32 if width <= 32 else 16, 32 if width <= 64 else 16, 4, 1)
    elif width > 128:
        tile = Tile(32, 32, 8, 2)
    elif width > 64:
        tile = Tile(64, 64, 8, 2) if in_registers else Tile(32, 128, 8, 2)
    else:
        tile = Tile(32 if in_registers else 64, 128, 8, 3)
    fewer = max(16, min(tile.keys, next_power_of_2(num_keys)))
    return Tile(tile.queries, fewer, tile.num_warps, tile.num_stages)


def dbias(width: int, dtype: torch.dtype) -> Tile:
    """Of the kernel that makes the gradient of the bias."""
    if dtype.itemsize > 2:
        return Tile(32, 32 if width <= 32 else 16, 4, 1)
    if width > 128:
        return Tile(64, 32, 8, 1)
    return Tile(64, 64, 4 if width <= 64 else 8, 2)


def walk(
    bias_shape: tuple[int, ...], query_shape: tuple[int, ...], num_keys: int, tile: Tile
) -> Walk:
    """How the gradient of a bias (B, H or 1, Tq or 1, Tk or 1) that R rows share is summed."""
    batch, rows, heads, num_queries, _ = query_shape
    whole = (heads, ceil(num_queries / tile.queries), ceil(num_keys / tile.keys))
    _, own_heads, own_queries, own_keys = bias_shape
    sums = (own_heads < heads, own_queries < num_queries, own_keys < num_keys)
    owned = (1 if each else n for each, n in zip(sums, whole, strict=True))
    summed = (n if each else 1 for each, n in zip(sums, whole, strict=True))
    return Walk(batch * prod(owned), rows * prod(summed), sums)


def _no_more_queries(tile: Tile, num_queries: int) -> Tile:
    """Fewer queries where there are fewer, as in generation; tensor cores take no less than 16."""
    fewer = max(16, min(tile.queries, next_power_of_2(num_queries)))
    return Tile(fewer, tile.keys, tile.num_warps, tile.num_stages)
