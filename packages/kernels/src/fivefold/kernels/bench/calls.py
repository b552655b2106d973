"""A function and its inputs, to be called again and again."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fivefold.kernels.samples import Inputs

Results = dict[str, Tensor]
Weights = tuple[Tensor | None, ...]


class Values:
    """What the contenders of a case share: inputs, gradients of the results, and first values.

    Some libraries write over their inputs, in place of results or to save memory. With copies for
    each of them an optimizer's state of gigabytes would not fit; with one, all read the same
    memory, and who writes to it restores it.

    Args:
        inputs: keyword arguments; copied.
        weights: the gradient of each result, None for those that are not differentiated; copied.
            Without any, calls are forward alone.

    Attributes:
        inputs: of every call.
        sources: those that get a gradient, by name.
        reached: positions of the results that are differentiated.
        weights: their gradients.
    """

    def __init__(self, inputs: Inputs, weights: Weights = ()):
        self.inputs: Inputs = {name: _copied(value) for name, value in inputs.items()}
        self.sources = {n: x for n, x in named_tensors(self.inputs) if x.requires_grad}
        self.reached = [i for i, weight in enumerate(weights) if weight is not None]
        given = [weight for weight in weights if weight is not None]
        self.weights = [_copied(weight) for weight in given]
        firsts = [*(x for _, x in named_tensors(inputs)), *given]
        mine = [*named_tensors(self.inputs), *((f"dy {i}", w) for i, w in enumerate(self.weights))]
        self._pairs = [(name, x, first) for (name, x), first in zip(mine, firsts, strict=True)]

    def changed(self) -> Results:
        """Inputs and gradients that do not have their first values."""
        return {
            f"changed {name}": x.detach()
            for name, x, first in self._pairs
            if not torch.equal(_comparable(x), _comparable(first))
        }

    def restore(self) -> None:
        """Give inputs and gradients their first values again."""
        with torch.no_grad():
            for _, x, first in self._pairs:
                x.copy_(first)


class Call:
    """Call it to run a function forward, or forward and backward.

    Args:
        function: takes the inputs.
        values: the inputs, shared.

    Attributes:
        writes: whether ``results`` found the values changed, so that they have to be restored after
            each further call.
    """

    def __init__(self, function: Callable[..., Any], values: Values):
        self._function, self._values = function, values
        self._leaves = list(values.sources.values())
        self.writes = False

    def __call__(self) -> tuple[Any, Sequence[Tensor | None]]:
        """What the function returns, and the gradients of the inputs that have one."""
        values = self._values
        outputs = self._function(**values.inputs)
        if not values.reached:
            return outputs, ()
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        reached = [outputs[i] for i in values.reached]
        return outputs, torch.autograd.grad(
            reached, self._leaves, values.weights, allow_unused=True
        )

    def results(self) -> Results:
        """Call once: results by position, gradients by input, and the values that it changed."""
        try:
            outputs, gradients = self()
            found = {f"result {i}": x.detach() for i, x in enumerate(_tensors(outputs))}
            for name, gradient in zip(self._values.sources, gradients, strict=bool(gradients)):
                if gradient is not None:
                    found[f"gradient of {name}"] = gradient
            changed = self._values.changed()
            self.writes = bool(changed)
            if self.writes:
                # Results may lie in the memory that is restored.
                found = {name: x.clone() for name, x in (found | changed).items()}
            return found
        finally:
            self.restore()

    def restore(self) -> None:
        """Give all values their first ones again."""
        self._values.restore()


def output_gradients(function: Callable[..., Any], inputs: Inputs) -> Weights:
    """Random gradients for the results of a function; None for those without a gradient."""
    outputs, _ = Call(function, Values(inputs))()
    return tuple(
        _normal_like(x, seed) if x.requires_grad else None
        for seed, x in enumerate(_tensors(outputs))
    )


def named_tensors(inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
    """Tensors among the inputs, those of lists too."""
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, list | tuple):
            yield from named_tensors({f"{name}[{i}]": each for i, each in enumerate(value)})


def _tensors(outputs: Any) -> list[Tensor]:
    return [x for _, x in named_tensors({"result": outputs})]


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, list | tuple):
        return type(value)(_copied(each) for each in value)
    return value


def _comparable(x: Tensor) -> Tensor:
    """Float8 has no comparison of its own."""
    return x.view(torch.uint8) if x.is_floating_point() and x.itemsize == 1 else x


def _normal_like(x: Tensor, seed: int) -> Tensor:
    generator = torch.Generator(x.device).manual_seed(seed)
    drawn = torch.randn(x.shape, generator=generator, device=x.device)
    return drawn.to(x.dtype)
