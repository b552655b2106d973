"""The errors of this package: one base, one subclass per thing that can be wrong."""

from fivefold.parallel_core.errors import CheckpointError, ConfigError


class FoldError(Exception):
    """Base of every error that fivefold.fold raises on purpose."""


class FoldConfigError(FoldError, ConfigError):
    """A configuration that cannot be, with its legal values; also a ``ValueError``."""


class FoldInputError(FoldError, ValueError):
    """Features, sequences or options that do not fit, with the numbers."""


class FoldParametersError(FoldError, CheckpointError):
    """Parameter files that are missing, damaged, of another preset or with wrong names."""


class FoldDataError(FoldError, ValueError):
    """A structure, an alignment or a folder of them that cannot be used, with its name."""
