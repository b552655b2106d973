"""Arithmetic of tile sizes."""


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n`` and 1."""
    return 1 << max(n - 1, 0).bit_length()
