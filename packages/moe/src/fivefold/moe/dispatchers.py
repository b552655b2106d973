"""Which dispatcher brings tokens to experts on other ranks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from fivefold.moe.deduplicated import DeduplicatedDispatcher
from fivefold.moe.dispatch import TokenDispatcher
from fivefold.moe.folded import FoldedDispatcher
from fivefold.moe.gathered import GatheredDispatcher
from fivefold.parallel_core.config import Config
from fivefold.parallel_core.topology import Topology


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatchConfig(Config):
    """How tokens come to the ranks of their experts.

    Attributes:
        dispatcher: "all_to_all" sends a row for each expert of a token; "deduplicated" one for each
            rank that has experts of it; "all_gather" brings all tokens to all ranks. The results
            are equal.
    """

    dispatcher: Literal["all_to_all", "deduplicated", "all_gather"] = "all_to_all"


DISPATCHERS: Mapping[str, type[FoldedDispatcher | DeduplicatedDispatcher | GatheredDispatcher]] = {
    "all_to_all": FoldedDispatcher,
    "deduplicated": DeduplicatedDispatcher,
    "all_gather": GatheredDispatcher,
}


def folded_dispatcher(
    dispatcher: nn.Module, topology: Topology, config: DispatchConfig | None = None
) -> nn.Module:
    """What takes the place of a layer's dispatcher over ``topology``.

    The given one stays where every expert is whole on this rank.
    """
    if topology.size("etp-ep") == 1 or not isinstance(dispatcher, TokenDispatcher):
        return dispatcher
    return dispatcher_for(config or DispatchConfig(), dispatcher.num_experts, topology)


def dispatcher_for(config: DispatchConfig, num_experts: int, topology: Topology) -> TokenDispatcher:
    """The dispatcher of a layer's ``num_experts`` experts over ``topology``."""
    return DISPATCHERS[config.dispatcher](num_experts, topology)
