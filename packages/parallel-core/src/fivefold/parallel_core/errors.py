"""The errors of this package: one base, one subclass per thing that can be wrong."""


class ParallelError(Exception):
    """Base of every error that fivefold.parallel_core raises on purpose."""


class LayoutError(ParallelError, ValueError):
    """A layout of ranks that cannot be, with the reason and what would be legal."""


class ConfigError(ParallelError, ValueError):
    """A configuration value that cannot be, with its legal values."""


class DataError(ParallelError, ValueError):
    """Training text or token files that are missing, empty or do not fit."""


class CheckpointError(ParallelError, RuntimeError):
    """A checkpoint that is missing, incomplete, damaged or of another shape."""


class RankError(ParallelError, RuntimeError):
    """A rank of a job that failed or died; carries the rank's own traceback."""
