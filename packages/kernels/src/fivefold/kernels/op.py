"""The way of an op: defined once, run by the best backend there is, visible to ``torch.compile``.

An op lives in a folder ``ops/<op>/``. Its ``op.py`` declares each hot path with ``define``: a
function whose annotations are the op's schema and whose body makes empty results of the right
shapes, for tracing. Beside it, ``reference.py``, ``aten.py``, ``cpu.py``, ``triton.py`` and
``cuda.py`` hold one function of the same name for each backend that the op has. A backend's file
may also hold ``refuses(op_name, *inputs) -> str | None``, the reason why it cannot run a call.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, update_wrapper
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fivefold.kernels import derivatives
from fivefold.kernels.backends import asked_everywhere, chosen_unasked, missing
from fivefold.kernels.derivatives import Formula
from fivefold.kernels.errors import BackendError
from fivefold.kernels.launch import recording

_specifying: ContextVar[bool] = ContextVar("_specifying", default=False)

_PLAIN = (Tensor, torch.nn.Parameter)

# Every op that was defined in this process, by its qualified name.
OPS: dict[str, "Op"] = {}


def define(
    namespace: str, *, backends: Sequence[str], mutates: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], "Op"]:
    """Register the decorated function as the op ``namespace::name``.

    The function is annotated as ``torch.library.custom_op`` wants it, has no defaults, and its
    last parameter is ``backend: str | None``. Its body gives the shapes: it returns new, empty
    tensors.

    Args:
        namespace: ``fivefold_`` and the package's name.
        backends: what the op has, best first; the first that can run a call does.
        mutates: names of the parameters that the op writes to.
    """
    return lambda shapes: Op(shapes, namespace, tuple(backends), tuple(mutates))


@contextmanager
def specification() -> Iterator[None]:
    """Run every op as its reference in plain sight of autograd, which then differentiates it.

    What an op computes in here, and the gradients that autograd derives, are its specification.
    """
    token = _specifying.set(True)
    try:
        yield
    finally:
        _specifying.reset(token)


class Op:
    """A registered op; calling it runs the best backend. Made by ``define``.

    Attributes:
        name: the name of its function.
        qualified: ``namespace::name``, under which torch knows it.
        backends: the backends it has, best first.
        overload: what ``torch.library.opcheck`` takes.
    """

    def __init__(
        self,
        shapes: Callable[..., Any],
        namespace: str,
        backends: tuple[str, ...],
        mutates: tuple[str, ...],
    ):
        update_wrapper(self, shapes)
        self.name = shapes.__name__
        self.qualified = f"{namespace}::{self.name}"
        self.backends = backends
        self._folder = shapes.__module__.rpartition(".")[0]
        self._function: type[torch.autograd.Function] | None = None
        self._functional = derivatives.functional(
            self.name, self, lambda ctx, inputs, output: None, derivatives.none(self.qualified)
        )
        self._mutates = bool(mutates)
        # By name, so that those who watch calls may put something else in its place.
        self._runs = update_wrapper(lambda *arguments: self._run(*arguments), shapes)
        self._registered = torch.library.custom_op(self.qualified, self._runs, mutates_args=mutates)
        self._registered.register_fake(shapes)
        self.overload = getattr(getattr(torch.ops, namespace), self.name).default
        OPS[self.qualified] = self

    def differentiate(self, save: Formula, backward: Formula, *, repeatedly: bool = False) -> None:
        """Give the op a gradient.

        Args:
            save: ``(ctx, inputs, output)``, keeps what the gradient needs.
            backward: ``(ctx, *gradients)``, one gradient or None for each input of the op,
                ``backend`` included.
            repeatedly: whether ``backward`` consists of what can itself be differentiated; the
                default is that differentiating a gradient is an error.
        """
        if not repeatedly:
            backward = derivatives.once(self.qualified, backward)
        self._registered.register_autograd(backward, setup_context=save)
        self._function = derivatives.eager_function(self.name, self._runs, save, backward)
        self._functional = derivatives.functional(self.name, self, save, backward)

    @property
    def differentiable(self) -> bool:
        """Whether the op has a gradient."""
        return self._function is not None

    def __call__(self, *arguments: Any) -> Any:
        """Run the op on all its arguments, by position, ``backend`` last."""
        if torch.compiler.is_compiling():
            return self.overload(*arguments)
        if _specifying.get():
            return self.implementation("reference")(*arguments[:-1])
        derivatives.check_tangents(self.qualified, arguments)
        if derivatives.in_transform():
            return self._in_transform(arguments)
        # Past the dispatcher where it has nothing to do: 10 instead of 26 microseconds a call.
        if _dispatcher_needed(arguments):
            return self.overload(*arguments)
        if self._function is not None and torch.is_grad_enabled() and _any_requires_grad(arguments):
            return self._function.apply(*arguments)
        return self._run(*arguments)

    def choose(self, inputs: Sequence[Any], asked: str | None = None) -> str:
        """The backend that runs these inputs.

        Args:
            inputs: arguments of the op without ``backend``.
            asked: a backend's name; the default is the environment's ``FIVEFOLD_BACKEND``, and
                without that the best there is.

        Raises:
            BackendError: the backend that was asked for cannot run this call.
        """
        if asked:
            return self._insist(asked, inputs)
        everywhere = asked_everywhere()
        if everywhere:
            return self._insist(everywhere, inputs, " by FIVEFOLD_BACKEND")
        device = _device(inputs)
        for backend in self.backends:
            if chosen_unasked(backend, device) and self.refusal(backend, inputs) is None:
                return backend
        raise BackendError(
            f"no backend of {self.qualified} can run this call: "
            + "; ".join(f"{name}: {self.refusal(name, inputs)}" for name in self.backends)
        )

    def refusal(self, backend: str, inputs: Sequence[Any]) -> str | None:
        """Why a backend cannot run these inputs; None where it can."""
        if backend not in self.backends:
            return f"this op has {', '.join(self.backends)}"
        reason = missing(backend, _device(inputs))
        if reason is None:
            reason = _refuses(self._folder, backend)(self.name, *inputs)
        return reason

    def implementation(self, backend: str) -> Callable[..., Any]:
        """The function that a backend has for this op."""
        return _implementation(self._folder, backend, self.name)

    def _in_transform(self, arguments: Sequence[Any]) -> Any:
        return (self.overload if self._mutates else self._functional.apply)(*arguments)

    def _insist(self, asked: str, inputs: Sequence[Any], by: str = "") -> str:
        reason = self.refusal(asked, inputs)
        if reason is not None:
            raise BackendError(f"{self.qualified} was asked{by} to run on {asked!r}: {reason}")
        return asked

    def _run(self, *arguments: Any) -> Any:
        *inputs, asked = arguments
        return self.implementation(self.choose(inputs, asked))(*inputs)


@cache
def _implementation(folder: str, backend: str, name: str) -> Callable[..., Any]:
    return getattr(import_module(f"{folder}.{backend}"), name)


@cache
def _refuses(folder: str, backend: str) -> Callable[..., str | None]:
    # Not before the backend is known to be there: its file imports what the backend needs.
    return getattr(import_module(f"{folder}.{backend}"), "refuses", lambda *_: None)


def _device(inputs: Sequence[Any]) -> str:
    return next(_tensors(inputs)).device.type


def _tensors(arguments: Sequence[Any]) -> Any:
    for value in arguments:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _any_requires_grad(arguments: Sequence[Any]) -> bool:
    return any(tensor.requires_grad for tensor in _tensors(arguments))


def _dispatcher_needed(arguments: Sequence[Any]) -> bool:
    """Whether anyone looks at ops: a mode, a subclass of tensors."""
    if torch._C._len_torch_dispatch_stack():
        return True
    # A meta tensor has a shape and no values, unless the launches of its kernels are recorded.
    if recording() is None and next(_tensors(arguments)).is_meta:
        return True
    return any(issubclass(kind, Tensor) and kind not in _PLAIN for kind in _kinds(arguments))


def _kinds(arguments: Sequence[Any]) -> set[type]:
    """Types of the arguments and of what is in lists; lists of an optimizer are long."""
    kinds: set[type] = set()
    for value in arguments:
        kinds.update(map(type, value if isinstance(value, list | tuple) else (value,)))
    return kinds
