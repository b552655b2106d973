"""Which rank stands where: attention and experts as two views of the same ranks.

Attention is split over the axes tp, cp, dp and pp (tensor, context, data, pipeline), experts
over etp, ep, edp and pp (expert tensor, expert, expert data, pipeline). Both views number the
whole world, and only the pipelines must agree; everything else may be folded freely
(arXiv 2504.14960). Pure arithmetic: no torch, no processes.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, fields
from itertools import product
from math import prod
from typing import Any

from . import layout_text
from .errors import LayoutError
from .layout_rules import AXES, DEFAULT_ORDER, explain_illegal, full_order, parse_axis, view_axes

__all__ = ["AXES", "DEFAULT_ORDER", "Layout", "LayoutError", "explain_illegal"]


@dataclass(frozen=True, slots=True)
class Layout:
    """Ranks 0 to ``world_size - 1`` arranged on the axes of both views. Immutable, hashable.

    Args:
        world_size: number of ranks; a multiple of tp*cp*pp and of etp*ep*pp.
        tp: tensor-parallel size of everything but the experts.
        cp: context-parallel size: ranks that share a sequence.
        pp: pipeline-parallel size, the same in both views.
        ep: expert-parallel size: ranks that hold different experts.
        etp: tensor-parallel size of each expert.
        order: tp, cp, ep, dp and pp from the fastest rank stride to the slowest; etp and edp
            stand where tp and dp stand. Axes of size 1 may be left out, and are appended.

    Raises:
        LayoutError: the degrees do not fit the world or the views have different pipelines; the
            message is that of ``explain_illegal``.
    """

    world_size: int
    _: KW_ONLY
    tp: int = 1
    cp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    order: str = DEFAULT_ORDER

    def __post_init__(self) -> None:
        reasons = explain_illegal(**self.to_dict())
        if reasons:
            raise LayoutError(reasons)
        object.__setattr__(self, "order", full_order(self.order))

    @classmethod
    def legal(cls, world_size: int, order: str = DEFAULT_ORDER) -> Iterator["Layout"]:
        """Every legal layout of ``world_size`` ranks in this order of axes.

        Raises:
            LayoutError: ``order`` names something that is not an axis, or an axis twice.
        """
        cls(1, order=order)  # A bad name is an error; it would else only yield nothing.
        for pp in _divisors(world_size):
            shapes = [
                (tensor, second)
                for tensor in _divisors(world_size // pp)
                for second in _divisors(world_size // pp // tensor)
            ]
            for (tp, cp), (etp, ep) in product(shapes, repeat=2):
                with suppress(LayoutError):
                    yield cls(world_size, tp=tp, cp=cp, pp=pp, ep=ep, etp=etp, order=order)

    @property
    def dp(self) -> int:
        """Data-parallel size of everything but the experts: what tp, cp and pp leave."""
        return self.world_size // (self.tp * self.cp * self.pp)

    @property
    def edp(self) -> int:
        """Data-parallel size of the experts: what etp, ep and pp leave."""
        return self.world_size // (self.etp * self.ep * self.pp)

    def axis_size(self, axis: str) -> int:
        """Number of ranks in each group of ``axis``, named as in ``groups``."""
        return prod(getattr(self, name) for name in parse_axis(axis)[1])

    def groups(self, axis: str) -> list[list[int]]:
        """All groups of ranks that differ only along ``axis``.

        Args:
            axis: tp, cp, dp, pp, etp, ep or edp, or a join of axes of one view such as
                ``"dp-cp"`` or ``"etp-ep"``. When ep, etp or edp is named it is the expert view,
                in which tp reads as etp and dp as edp.

        Returns:
            Disjoint groups that cover the world. Members follow the named axes and groups the
            other axes, both in the order of ``order`` (not of ``axis``), leftmost fastest; this
            is the enumeration of Megatron-Core's ``RankGenerator``.

        Raises:
            LayoutError: no such axis in one view.
        """
        named, others = self._split(axis)
        offsets = _lattice(named)
        return [[start + offset for offset in offsets] for start in _lattice(others)]

    def group_of(self, axis: str, rank: int) -> tuple[int, ...]:
        """The group of ``axis`` that ``rank`` is in; raises LayoutError as ``groups`` does."""
        self._check_rank(rank)
        named, _ = self._split(axis)
        start = rank - sum(rank // stride % size * stride for size, stride in named)
        return tuple(start + offset for offset in _lattice(named))

    def coordinates(self, rank: int) -> dict[str, int]:
        """Index of ``rank`` on each of the seven axes.

        Raises:
            LayoutError: ``rank`` is not in the world.
        """
        self._check_rank(rank)
        steps = self._steps(experts=True) | self._steps(experts=False)
        return {axis: rank // steps[axis][1] % steps[axis][0] for axis in AXES}

    def stride(self, axis: str) -> int:
        """Distance in ranks between neighbours along one axis, which may not be a join."""
        experts, names = parse_axis(axis)
        if len(names) > 1:
            raise LayoutError(f"a join has no single stride, found {axis!r}; legal: one of {AXES}")
        return self._steps(experts)[axis][1]

    def spans(self, axis: str, ranks_per_node: int = 8) -> int:
        """Largest number of nodes that one group of ``axis`` touches.

        Args:
            axis: named as in ``groups``.
            ranks_per_node: ranks on one node; node n holds the ranks from n * ranks_per_node.

        Raises:
            LayoutError: ``ranks_per_node`` is no integer of at least 1, or no such axis.
        """
        layout_text.check_ranks_per_node(ranks_per_node)
        return max(len({rank // ranks_per_node for rank in group}) for group in self.groups(axis))

    def folding(self, axis: str) -> dict[str, int] | None:
        """Where an axis of the experts lies in the attention view.

        Args:
            axis: named as in ``groups``.

        Returns:
            The attention axes that every group of ``axis`` covers and how many indices of each,
            fastest first: ``{"tp": 2, "dp": 2}`` for ep=4 over tp=2 and half of dp=4. None when
            the groups are not all a product of attention axes, or not of the same ones.
        """
        return layout_text.folding(self, axis)

    def explain(self, ranks_per_node: int = 8) -> str:
        """Both views side by side, the nodes that their groups touch, and the folding in words.

        Args:
            ranks_per_node: ranks on one node.

        Raises:
            LayoutError: ``ranks_per_node`` is no integer of at least 1.
        """
        return layout_text.explain(self, ranks_per_node)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the arguments, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Layout":
        """The layout that ``to_dict`` described; raises LayoutError for names it does not know."""
        legal = [f.name for f in fields(cls)]
        unknown = sorted(set(data) - set(legal))
        if unknown or "world_size" not in data:
            wrong = f"found unknown {unknown}" if unknown else "world_size is missing"
            raise LayoutError(f"a layout is described by {legal}; {wrong}")
        return cls(**data)

    def _steps(self, experts: bool) -> dict[str, tuple[int, int]]:
        """Size and rank stride of each axis of one view, fastest first."""
        steps, stride = {}, 1
        for axis in view_axes(self.order, experts):
            steps[axis] = (getattr(self, axis), stride)
            stride *= getattr(self, axis)
        return steps

    def _split(self, axis: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Sizes and strides of the axes that ``axis`` names, and of the others of its view."""
        experts, names = parse_axis(axis)
        steps = self._steps(experts)
        named = [steps[name] for name in steps if name in names]
        return named, [steps[name] for name in steps if name not in names]

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.world_size:
            raise LayoutError(f"rank {rank} is not in the world; legal: 0 to {self.world_size - 1}")


def _lattice(steps: Iterable[tuple[int, int]]) -> list[int]:
    """All sums of index * stride over ``(size, stride)`` steps, the first step fastest."""
    sums = [0]
    for size, stride in steps:
        sums = [index * stride + inner for index in range(size) for inner in sums]
    return sums


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
