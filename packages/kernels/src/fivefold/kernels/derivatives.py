"""How autograd and ``torch.func`` differentiate an op; and errors for what they cannot do.

A derivative that an op lacks would otherwise be zero without a word.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fivefold.kernels.errors import KernelInputError

Formula = Callable[..., Any]
Function = type[torch.autograd.Function]


def eager_function(name: str, run: Formula, save: Formula, backward: Formula) -> Function:
    """What autograd applies where nothing else looks at ops."""

    def forward(ctx: Any, *arguments: Any) -> Any:
        # Not a setup_context of its own: torch then binds the arguments anew in every call,
        # which takes longer than all the rest.
        output = run(*arguments)
        save(ctx, arguments, output)
        return output

    formulas = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), formulas)


def functional(name: str, call: Formula, save: Formula, backward: Formula) -> Function:
    """What transforms of ``torch.func`` apply: ``call`` is the op again, one transform less.

    A batch is a loop over its members.
    """

    def forward(*arguments: Any) -> Any:
        output = call(*arguments)
        return tuple(output) if isinstance(output, list) else output

    def over_batch(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        members = range(info.batch_size)
        made = [call(*_member(list(arguments), list(in_dims), i)) for i in members]
        if isinstance(made[0], Tensor):
            return torch.stack(made), 0
        stacked = tuple(torch.stack(outputs) for outputs in zip(*made, strict=True))
        return stacked, (0,) * len(stacked)

    formulas = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(save),
        "backward": staticmethod(backward),
        "vmap": staticmethod(over_batch),
    }
    return type(name, (torch.autograd.Function,), formulas)


def once(name: str, backward: Formula) -> Formula:
    """A formula whose results may be in a graph, where differentiating them is an error."""

    def formula(ctx: Any, *gradients: Tensor | None) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        ctx = _Unpacked(ctx)
        with torch.no_grad():
            found = backward(ctx, *gradients)
        # All that the gradients depend on, and one leaf, in case that autograd knows of nothing.
        parents = [*gradients, *ctx.saved_tensors, getattr(ctx, "sources", None)]
        if not in_transform():
            parents.append(torch.zeros((), requires_grad=True))
        return tuple(x if x is None else _Last.apply(name, x, *parents) for x in found)

    return formula


def keep_sources(ctx: Any, *sources: Tensor | None) -> None:
    """Let autograd find the inputs that a gradient depends on where none of them is saved.

    For a ``save`` that keeps what it made of the inputs; their values are not kept.
    """
    with torch.enable_grad():
        ctx.sources = _Sources.apply(*sources)


def none(name: str) -> Formula:
    """The formula of an op that has no gradient."""

    def formula(ctx: Any, *gradients: Tensor | None) -> Any:
        raise KernelInputError(f"{name} has no gradient")

    return formula


class _Unpacked:
    """A ctx whose saved tensors are unpacked once: checkpointing allows it no second time."""

    def __init__(self, ctx: Any):
        self._ctx = ctx
        self.saved_tensors: tuple[Tensor | None, ...] = ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


class _Sources(torch.autograd.Function):
    """A tensor of no values in whose graph others are; ``_Last`` ends a walk before it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*sources: Tensor | None) -> Tensor:
        return next(x for x in sources if x is not None).new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps nothing."""


class _Last(torch.autograd.Function):
    """A gradient that has none itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, x: Tensor, *parents: Tensor | None) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise KernelInputError(
            f"{ctx.name} has a gradient, and its gradient has none: only torch's own functions "
            "can be differentiated twice here"
        )


def check_tangents(name: str, arguments: Sequence[Any]) -> None:
    """Raise ``KernelInputError`` where forward-mode differentiation asks for a derivative."""
    if forward_ad._current_level < 0:
        return
    for x in arguments:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise KernelInputError(
                f"{name} has no forward-mode derivative, and a tensor has a tangent: use "
                "torch.func.vjp or torch.autograd.grad"
            )


def wants_gradient(x: Tensor | None) -> bool:
    """Whether somebody may ask for the gradient of a floating-point tensor.

    Within ``torch.func`` a tensor does not know what transforms further out want of it.
    """
    return x is not None and torch.is_grad_enabled() and (x.requires_grad or in_transform())


def in_transform() -> bool:
    """Whether a transform of ``torch.func`` is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _member(value: Any, dim: Any, index: int) -> Any:
    """One of a batch of arguments; those without a dim belong to all."""
    if isinstance(value, list):
        dims = dim if isinstance(dim, list) else [dim] * len(value)
        return [_member(v, d, index) for v, d in zip(value, dims, strict=True)]
    return value if dim is None else value.select(dim, index)
