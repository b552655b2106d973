"""Optimizers whose step is one pass over memory."""

from fivefold.kernels.optimizer.adamw import FusedAdamW

__all__ = ["FusedAdamW"]
