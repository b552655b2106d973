"""Ops of this package, registered, tested and measured as those of fivefold.kernels."""
