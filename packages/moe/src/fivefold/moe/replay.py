"""Writing down which experts tokens chose, and making them choose the same again.

For reinforcement learning, where the policy's forward must route as the sampler did, and for
finding out what differs between two runs.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from fivefold.moe.errors import MoEInputError
from fivefold.parallel_core.recomputing import is_recomputing


@dataclass(kw_only=True)
class RoutingRecord:
    """The experts of every call of every router, in the order of the calls.

    Attributes:
        choices: layer to the experts of each call, integers (B, S, K).
        mode: whether routers write their choices or take them from here.
    """

    mode: Literal["write", "read"] = "write"
    choices: dict[int, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    _next: dict[tuple[int, bool], int] = field(default_factory=lambda: defaultdict(int))

    def pass_through(self, layer: int, experts_bsk: Tensor) -> Tensor:
        """A router's choice, written down, or what stands here in its place.

        Raises:
            MoEInputError: nothing is left for this layer, or it is of another shape.
        """
        if self.mode == "read":
            return self._read(layer, experts_bsk)
        if not is_recomputing():
            self.choices[layer].append(experts_bsk)
        return experts_bsk

    def _read(self, layer: int, experts_bsk: Tensor) -> Tensor:
        # Backward recomputes microbatches in the order of their forwards.
        key = (layer, is_recomputing())
        call, calls = self._next[key], self.choices.get(layer, [])
        if call == len(calls):
            raise MoEInputError(
                f"layer {layer} routes for the {call + 1}. time, but the record has {len(calls)} "
                f"of its calls; its layers are {sorted(self.choices) or 'none'}"
            )
        found = calls[call]
        if found.shape != experts_bsk.shape:
            raise MoEInputError(
                f"call {call} of layer {layer} in the record is {tuple(found.shape)} (sequences, "
                f"tokens, experts), this call is {tuple(experts_bsk.shape)}"
            )
        self._next[key] += 1
        return found.to(experts_bsk.device)


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecord]:
    """Write down what the routers of ``model`` choose inside.

    Example:
        >>> with record_routing(model) as record:         # doctest: +SKIP
        ...     model(ids)
        >>> with replay_routing(model, record.choices):   # doctest: +SKIP
        ...     model(ids)
    """
    with _attached(model, RoutingRecord()) as record:
        yield record


@contextmanager
def replay_routing(model: nn.Module, choices: Mapping[int, Sequence[Tensor]]) -> Iterator[None]:
    """Make the routers of ``model`` choose as written down; weights are computed anew.

    Args:
        model: one rank's part of it is enough.
        choices: of ``RoutingRecord``.

    Raises:
        MoEInputError: in the forward, where the record does not fit it.
    """
    own = {layer: list(calls) for layer, calls in choices.items()}
    with _attached(model, RoutingRecord(mode="read", choices=own)):
        yield


@contextmanager
def _attached(model: nn.Module, record: RoutingRecord) -> Iterator[RoutingRecord]:
    from fivefold.moe.router import Router

    routers = [module for module in model.modules() if isinstance(module, Router)]
    if not routers:
        raise MoEInputError(f"{type(model).__name__} has no router to record")
    earlier = [router.record for router in routers]
    for router in routers:
        router.record = record
    try:
        yield record
    finally:
        for router, before in zip(routers, earlier, strict=True):
            router.record = before
