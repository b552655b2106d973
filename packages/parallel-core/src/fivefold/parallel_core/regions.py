"""Recomputing named regions of a model in backward instead of keeping their activations.

Korthikanti et al., arXiv 2205.05198, section 5: "selective" repeats only the attention core, whose
scores and probabilities are most of the memory and little of the work; "full" keeps only the input
of each layer.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from typing import Any, Protocol, runtime_checkable

from torch import nn
from torch.utils.checkpoint import checkpoint

from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.names import matching
from fivefold.parallel_core.recomputing import is_requested, recomputation

MODES: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "selective": ("attention_core",),
    "full": ("layer",),
}


@runtime_checkable
class HasRegions(Protocol):
    """A model that names the parts of itself that may be recomputed.

    Attributes:
        recompute_regions: region to the pattern of its modules' names; ``*`` stands for one part of
            a dotted name. "attention_core" and "layer" are what the modes use.
    """

    recompute_regions: Mapping[str, str]


class _Recomputed:
    """Marks a class whose modules make their activations again in backward."""


class _OnRequest(_Recomputed):
    """Marks a class whose modules do so for the calls that ask for it."""


def recompute(
    model: nn.Module, regions: str | Sequence[str], *, only_on_request: bool = False
) -> None:
    """Recompute regions of ``model`` in backward, in place; call it after the plan was applied.

    Results and gradients are bitwise what they were: random numbers are restored. Parameters keep
    their names.

    Args:
        model: with ``recompute_regions``, which pipeline stages keep.
        regions: "none", "selective" (attention cores), "full" (whole layers), or names of the
            model's regions, as a list or joined by "+".
        only_on_request: recompute only what runs forward inside ``request_recomputation``; such
            regions may hold others that always are.

    Raises:
        ConfigError: a mode or region that is not there, regions inside each other, or one that is
            recomputed in the other way already.

    Example:
        >>> recompute(model, "selective")              # doctest: +SKIP
        >>> recompute(model, ["attention_core", "mlp_norm"])  # doctest: +SKIP
    """
    names = _names(model, _patterns(model, regions))
    for outer in names:
        inner = next((name for name in names if name.startswith(f"{outer}.")), None)
        if inner is not None:
            raise ConfigError(
                f"{inner} lies inside {outer}, which is recomputed as a whole; choose one of them"
            )
    for name in names:
        module, mark = model.get_submodule(name), _OnRequest if only_on_request else _Recomputed
        if not isinstance(module, _Recomputed):
            module.__class__ = _recomputed(type(module), mark)
        elif isinstance(module, _OnRequest) != only_on_request:
            ways = ["always", "on request"]
            raise ConfigError(
                f"{name} cannot be recomputed {ways[only_on_request]}; it is "
                f"{ways[not only_on_request]} already (on request is what an activation_budget "
                "does with layers; with one, leave them out of the regions)"
            )


def on_request(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of ``model`` that are recomputed only on request."""
    return (module for module in model.modules() if isinstance(module, _OnRequest))


def check_regions(model: nn.Module, regions: str | Sequence[str]) -> None:
    """Raise what ``recompute`` would for the whole ``model``, and change nothing.

    Raises:
        ConfigError: a mode or region that is not there, or one that names no module.
    """
    for region, pattern in _patterns(model, regions).items():
        if not _names(model, {region: pattern}):
            raise ConfigError(
                f"the region {region!r} of {type(model).__name__} is {pattern!r}, which names no "
                "module"
            )


def _patterns(model: nn.Module, regions: str | Sequence[str]) -> Mapping[str, str]:
    if isinstance(regions, str):
        regions = MODES[regions] if regions in MODES else regions.split("+")
    known = model.recompute_regions if isinstance(model, HasRegions) else {}
    unknown = [region for region in regions if region not in known]
    if unknown:
        raise ConfigError(
            f"{type(model).__name__} has no region {', '.join(map(repr, unknown))} to recompute; "
            f"there are the modes {', '.join(MODES)} and its regions {', '.join(known) or '(none)'}"
        )
    return {region: known[region] for region in regions}


def _names(model: nn.Module, patterns: Mapping[str, str]) -> list[str]:
    return [name for name, _ in model.named_modules() if matching(name, patterns.values())]


def _recomputed(kind: type[nn.Module], mark: type[_Recomputed]) -> type[nn.Module]:
    """The class of a recomputed module: all as before, but for what ``forward`` keeps."""
    once = kind.forward
    always = mark is _Recomputed

    @wraps(once)  # its arguments keep their names
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not (always or is_requested()):
            return once(self, *args, **kwargs)
        return checkpoint(
            partial(once, self), *args, use_reentrant=False, context_fn=_contexts, **kwargs
        )

    body = {"__module__": kind.__module__, "forward": forward}
    return type(kind.__name__, (mark, kind), body)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), recomputation()
