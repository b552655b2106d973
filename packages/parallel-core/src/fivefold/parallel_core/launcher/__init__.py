"""Starting the ranks of a job: forked on this machine, or joined to the ones torchrun started."""

from fivefold.parallel_core.launcher.launch import (
    connect,
    disconnect,
    launch,
    place,
    under_torchrun,
)

__all__ = ["connect", "disconnect", "launch", "place", "under_torchrun"]
