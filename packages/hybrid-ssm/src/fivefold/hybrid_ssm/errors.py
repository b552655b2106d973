"""The errors of this package: one base, one subclass per thing that can be wrong."""

from fivefold.parallel_core.errors import CheckpointError, ConfigError


class HybridError(Exception):
    """Base of every error that fivefold.hybrid_ssm raises on purpose."""


class HybridConfigError(HybridError, ConfigError):
    """A model configuration that cannot be, with its legal values; also a ``ValueError``."""


class HybridInputError(HybridError, ValueError):
    """Tensors or options of a call that do not fit the model, with the numbers."""


class HybridWeightsError(HybridError, CheckpointError):
    """Model files that are missing, damaged, of another shape or of another model."""
