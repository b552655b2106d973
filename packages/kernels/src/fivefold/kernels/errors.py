"""The errors of this package: one base, one subclass per thing that can be wrong."""


class KernelError(Exception):
    """Base of every error that fivefold.kernels raises on purpose."""


class KernelInputError(KernelError, ValueError):
    """Tensors or options that do not fit an op, with what was found and what would fit."""


class BackendError(KernelError, RuntimeError):
    """A backend that was asked for by name and cannot run this call, with the reason."""


class CompileError(KernelError, RuntimeError):
    """A kernel that a compiler refused, with what the compiler said."""
