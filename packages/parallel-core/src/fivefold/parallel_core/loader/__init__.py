"""Samples of any map-style dataset from worker processes, whichever are ready first."""

from fivefold.parallel_core.loader.loader import Loaded, ReadyFirstLoader
from fivefold.parallel_core.loader.order import Order

__all__ = ["Loaded", "Order", "ReadyFirstLoader"]
