"""A layout in words: its two views as a table, and what is folded over what."""

from math import prod
from typing import TYPE_CHECKING

from .errors import LayoutError
from .layout_rules import view_axes

if TYPE_CHECKING:
    from .layout import Layout

_MAX_GROUPS = 2
_MAX_MEMBERS = 4


def folding(layout: "Layout", axis: str) -> dict[str, int] | None:
    """See ``Layout.folding``."""
    found: dict[str, int] = {}
    for group in layout.groups(axis):
        coordinates = [layout.coordinates(rank) for rank in group]
        extents = {
            name: len({c[name] for c in coordinates}) for name in view_axes(layout.order, False)
        }
        extents = {name: extent for name, extent in extents.items() if extent > 1}
        if prod(extents.values()) != len(group) or extents != (found or extents):
            return None
        found = extents
    return found


def check_ranks_per_node(ranks_per_node: object) -> None:
    """Raise LayoutError for what is no number of ranks on a node."""
    if type(ranks_per_node) is not int or ranks_per_node < 1:
        raise LayoutError(
            f"ranks_per_node must be an integer of at least 1, found {ranks_per_node!r}"
        )


def explain(layout: "Layout", ranks_per_node: int) -> str:
    """See ``Layout.explain``."""
    check_ranks_per_node(ranks_per_node)
    nodes = -(-layout.world_size // ranks_per_node)
    lines = [
        f"{_count(layout.world_size, 'rank')} on {_count(nodes, 'node')} of {ranks_per_node},"
        f" axes from fastest to slowest: {layout.order}",
        "",
    ]
    left = _table(layout, "attention", False, ranks_per_node)
    right = _table(layout, "experts", True, ranks_per_node)
    width = max(map(len, left))
    lines += [f"{a:<{width}} | {b}".rstrip() for a, b in zip(left, right, strict=True)]
    lines.append("")
    lines += [_fold_line(layout, axis) for axis in ("etp", "ep", "edp")]
    lines.append(f"pp={layout.pp} is the same in both views")
    return "\n".join(lines)


def _table(layout: "Layout", title: str, experts: bool, ranks_per_node: int) -> list[str]:
    rows = [(title, "size", "stride", "nodes", "groups")]
    for axis in view_axes(layout.order, experts):
        size, stride = str(layout.axis_size(axis)), str(layout.stride(axis))
        nodes = str(layout.spans(axis, ranks_per_node))
        rows.append((axis, size, stride, nodes, _first_groups(layout.groups(axis))))
    return [f"{a:<9} {b:>5} {c:>6} {d:>5}  {e}" for a, b, c, d, e in rows]


def _first_groups(groups: list[list[int]]) -> str:
    shown = " ".join(_short(group) for group in groups[:_MAX_GROUPS])
    return f"{shown} ..({len(groups)})" if len(groups) > _MAX_GROUPS else shown


def _short(group: list[int]) -> str:
    if len(group) <= _MAX_MEMBERS:
        return "[" + " ".join(map(str, group)) + "]"
    first = " ".join(map(str, group[: _MAX_MEMBERS // 2]))
    return f"[{first} .. {group[-1]}]"


def _fold_line(layout: "Layout", axis: str) -> str:
    size = layout.axis_size(axis)
    if size == 1:
        return f"{axis}=1 folds nothing"
    over = folding(layout, axis)
    if over is None:
        return f"{axis}={size} cuts across attention axes: its groups are no product of them"
    parts = [_part(name, extent, layout.axis_size(name)) for name, extent in over.items()]
    return f"{axis}={size} folds {' x '.join(parts)}"


def _part(name: str, extent: int, size: int) -> str:
    return f"{name}({extent})" if extent == size else f"{name}({extent} of {size})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
