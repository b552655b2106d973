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


class LoaderError(ParallelError, RuntimeError):
    """A sample that its worker could not make, by name, or a loader that has ended."""


class RankError(ParallelError, RuntimeError):
    """A rank of a job that failed or died; carries the rank's own traceback.

    Attributes:
        summary: what a user needs to know: one line where the rank's error is one of `EXPECTED`,
            else the whole message.

    Args:
        message: which rank, what happened, and its traceback.
        summary: the same without the traceback; None is the message.
    """

    def __init__(self, message: str, summary: str | None = None):
        super().__init__(message)
        self.summary = message if summary is None else summary


class FollowUpError(RankError):
    """A rank that ends because another one failed, which says why.

    Attributes:
        cause: the rank that says why; None where it is not known.

    Args:
        message: what this rank noticed.
        cause: the rank that says why.
    """

    def __init__(self, message: str, cause: int | None = None):
        super().__init__(message)
        self.cause = cause


EXPECTED: tuple[type[Exception], ...] = (ParallelError, ImportError, OSError)
"""Errors whose message says all: our own, a package that is missing, and the system's."""
