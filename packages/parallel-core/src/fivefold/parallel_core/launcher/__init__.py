"""Starting the ranks of a job: forked on this machine, or joined to the ones torchrun started."""

from fivefold.parallel_core.launcher.launch import (
    connect,
    disconnect,
    launch,
    place,
    under_torchrun,
)
from fivefold.parallel_core.launcher.world import rejoin

__all__ = ["connect", "disconnect", "launch", "place", "rejoin", "under_torchrun"]
