"""The errors of this package: one base, one subclass per thing that can be wrong."""

from fivefold.parallel_core.errors import CheckpointError, ConfigError


class MoEError(Exception):
    """Base of every error that fivefold.moe raises on purpose."""


class MoEConfigError(MoEError, ConfigError):
    """A model configuration that cannot be, with its legal values; also a ``ValueError``."""


class MoEInputError(MoEError, ValueError):
    """Tensors or options of a call that do not fit the model, with the numbers."""


class MoEWeightsError(MoEError, CheckpointError):
    """Model files that are missing, damaged, of another shape or of another model."""
