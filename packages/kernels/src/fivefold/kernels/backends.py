"""Which ways of running an op this machine has.

====================  ============================================================  =============
backend               what it is                                                    needs
====================  ============================================================  =============
``reference``         plain PyTorch, the specification                              nothing
``aten``              a fused kernel that torch brings                              nothing
``cpu``               one C++ file, compiled at first use                           a C++ compiler
``triton``            a Triton kernel                                               ``[triton]``
``cuda``              a CUDA C++ kernel, compiled by NVRTC                          ``[cuda]``
====================  ============================================================  =============
"""

import os
from functools import cache
from importlib.util import find_spec

BACKENDS = ("reference", "aten", "cpu", "triton", "cuda")


def missing(backend: str, device: str) -> str | None:
    """Why tensors of a device type cannot use a backend here; None where they can.

    The ``meta`` device stands for a GPU whose kernels are recorded instead of run.
    """
    if backend == "cpu":
        return _missing_cpu(device)
    if backend in ("triton", "cuda"):
        return _missing_gpu(backend, device)
    return None


def chosen_unasked(backend: str, device: str) -> bool:
    """Whether a backend is worth choosing for a device type when nobody asked for it by name.

    Triton's interpreter is a proof of a kernel and not a way to run it.
    """
    return device in ("cuda", "meta") or backend not in ("triton", "cuda")


def asked_everywhere() -> str | None:
    """The backend that the environment asks for in all calls that name none."""
    return os.environ.get("FIVEFOLD_BACKEND") or None


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, by ``TRITON_INTERPRET=1`` from the start."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _missing_cpu(device: str) -> str | None:
    from fivefold.kernels import native

    if device != "cpu":
        return f"it runs tensors of the CPU, these are on {device}"
    return native.missing()


def _missing_gpu(backend: str, device: str) -> str | None:
    library = {"triton": "triton", "cuda": "cuda.core"}[backend]
    if not _installed(library):
        return f'{library} is not installed: pip install "fivefold-kernels[{backend}]"'
    interpreted = backend == "triton" and interpreting()
    if device in ("cuda", "meta") or (device == "cpu" and interpreted):
        return None
    interpreter = ", or in Triton's interpreter (TRITON_INTERPRET=1)" * (backend == "triton")
    return f"it runs tensors of a CUDA device{interpreter}; these are on {device}"


@cache
def _installed(library: str) -> bool:
    try:
        return find_spec(library) is not None
    except ModuleNotFoundError:  # the parent of a dotted name
        return False
