"""Does every collective work on every group of a layout, and how fast: ``examine``."""

from fivefold.parallel_core.doctor.examination import Options, examine
from fivefold.parallel_core.doctor.report import Report

__all__ = ["Options", "Report", "examine"]
