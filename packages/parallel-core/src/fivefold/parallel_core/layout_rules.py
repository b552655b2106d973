"""The axes of a layout, their two views, and every reason why a choice cannot be laid out."""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from math import lcm, prod

from .errors import LayoutError

ATTENTION_AXES = ("tp", "cp", "dp", "pp")
EXPERT_AXES = ("etp", "ep", "edp", "pp")
AXES = ("tp", "cp", "dp", "pp", "etp", "ep", "edp")
DEFAULT_ORDER = "tp-cp-ep-dp-pp"
_ORDER_NAMES = tuple(DEFAULT_ORDER.split("-"))
# One order string lays out both views: the experts' tensor and data axes take the places of
# "tp" and "dp" in it.
_EXPERT_TWIN = {"tp": "etp", "dp": "edp"}


def full_order(order: str) -> str:
    """``order`` with the axes that it leaves out appended, in the default order."""
    names = order.split("-")
    return "-".join(names + [name for name in _ORDER_NAMES if name not in names])


@lru_cache(maxsize=1024)
def view_axes(order: str, experts: bool) -> tuple[str, ...]:
    """Axes of one view in the order that ``order`` gives them, fastest rank stride first."""
    names = full_order(order).split("-")
    if experts:
        return tuple(_EXPERT_TWIN.get(name, name) for name in names if name != "cp")
    return tuple(name for name in names if name != "ep")


@lru_cache(maxsize=1024)
def parse_axis(name: str) -> tuple[bool, frozenset[str]]:
    """Read an axis or a join of axes of one view.

    Args:
        name: such as ``"tp"``, ``"dp-cp"`` or ``"tp-ep-pp"``. Naming ep, etp or edp selects the
            expert view, in which tp reads as etp and dp as edp.

    Returns:
        Whether it is the expert view, and the axes of that view.

    Raises:
        LayoutError: an unknown axis, an axis of the other view, or one axis twice.
    """
    names = name.split("-")
    experts = not {"ep", "etp", "edp"}.isdisjoint(names)
    axes = [_EXPERT_TWIN.get(n, n) for n in names] if experts else names
    view = EXPERT_AXES if experts else ATTENTION_AXES
    wrong = [axis for axis in axes if axis not in view]
    if not wrong and len(set(axes)) == len(axes):
        return experts, frozenset(axes)
    legal = (
        "legal: one axis or a join such as 'tp-cp' of (tp, cp, dp, pp), or of (etp, ep, edp, pp)"
    )
    if not wrong:
        raise LayoutError(f"axis {name!r} names an axis of the view {view} twice; {legal}")
    where = f"the expert view {view}, which {name!r} selects" if experts else "either view"
    raise LayoutError(f"axis {name!r}: {wrong[0]!r} is not in {where}; {legal}")


def explain_illegal(
    world_size: int,
    *,
    tp: int = 1,
    cp: int = 1,
    pp: int = 1,
    ep: int = 1,
    etp: int = 1,
    order: str = DEFAULT_ORDER,
) -> str:
    """Say why ``Layout`` refuses these arguments; the arguments are those of ``Layout``.

    Returns:
        Every reason on a line of its own, each with the numbers and what would be legal; ``""``
        when the layout is legal.
    """
    degrees = {"tp": tp, "cp": cp, "pp": pp, "ep": ep, "etp": etp}
    reasons = _not_positive({"world_size": world_size, **degrees})
    reasons = reasons or _not_divisible(world_size, degrees)
    reasons += _bad_names(order)
    if not reasons:
        sizes = degrees | {
            "dp": world_size // (tp * cp * pp),
            "edp": world_size // (etp * ep * pp),
        }
        reasons = _left_out(order, sizes) or _pipelines_differ(order, sizes)
    if not reasons:
        return ""
    asked = ", ".join(f"{name}={size!r}" for name, size in degrees.items())
    lines = [f"Layout({world_size!r}, {asked}, order={order!r}) is not legal:", *reasons]
    return "\n  - ".join(lines)


def _not_positive(degrees: Mapping[str, object]) -> list[str]:
    return [
        f"{name} must be an integer of at least 1, found {size!r}"
        for name, size in degrees.items()
        if not isinstance(size, int) or isinstance(size, bool) or size < 1
    ]


def _model_sizes(degrees: Mapping[str, int]) -> dict[str, int]:
    """Ranks that one replica takes in each view; the world must be a multiple of both."""
    products = ("tp*cp*pp", "etp*ep*pp")
    return {product: prod(degrees[axis] for axis in product.split("*")) for product in products}


def _not_divisible(world_size: int, degrees: Mapping[str, int]) -> list[str]:
    reasons = []
    for product, size in _model_sizes(degrees).items():
        if world_size % size:
            factors = "*".join(str(degrees[axis]) for axis in product.split("*"))
            reasons.append(
                f"world_size {world_size} is not a multiple of {product} = {factors} = {size}"
                f" (remainder {world_size % size}); nearest legal: "
                + ", or ".join(_nearest_legal(world_size, degrees, product))
            )
    return reasons


def _nearest_legal(world_size: int, degrees: Mapping[str, int], product: str) -> list[str]:
    """Single changes that help: of one axis of ``product``, or of the size of the world."""
    changes = []
    for axis in product.split("*"):
        # pp is in both products, so a proposed pp must not break the other one.
        judged = list(_model_sizes(degrees)) if axis == "pp" else [product]
        legal = []
        for size in range(1, world_size + 1):
            sizes = _model_sizes({**degrees, axis: size})
            if all(world_size % sizes[name] == 0 for name in judged):
                legal.append(size)
        if legal:
            changes.append(f"{axis}={_neighbours(legal, degrees[axis])}")
    step = lcm(*_model_sizes(degrees).values())
    below = world_size - world_size % step
    changes.append(f"world_size={_neighbours([below, below + step], world_size)}")
    return changes


def _neighbours(values: Iterable[int], target: int) -> str:
    """The closest positive value below and above ``target``, in words."""
    positive = [v for v in values if v > 0]
    below, above = [v for v in positive if v <= target], [v for v in positive if v > target]
    return " or ".join(str(v) for v in [*below[-1:], *above[:1]])


def _bad_names(order: object) -> list[str]:
    legal = f"legal: each of {', '.join(_ORDER_NAMES)} once, joined by '-'"
    if not isinstance(order, str):
        return [f"order must be a string, found {order!r}; {legal}"]
    names = order.split("-")
    reasons = [
        f"order {order!r} names {name!r}, which is not an axis; {legal}"
        + (" (etp and edp stand where tp and dp stand)" if name in ("etp", "edp") else "")
        for name in dict.fromkeys(names)
        if name not in _ORDER_NAMES
    ]
    reasons += [
        f"order {order!r} names {name!r} {names.count(name)} times; {legal}"
        for name in _ORDER_NAMES
        if names.count(name) > 1
    ]
    return reasons


def _left_out(order: str, sizes: Mapping[str, int]) -> list[str]:
    reasons = []
    for name in _ORDER_NAMES:
        axes = dict.fromkeys((name, _EXPERT_TWIN.get(name, name)))
        found = " and ".join(f"{axis}={sizes[axis]}" for axis in axes)
        if name not in order.split("-") and any(sizes[axis] > 1 for axis in axes):
            reasons.append(
                f"order {order!r} leaves out {name!r} but {found}; only axes of size 1 may be"
                f" left out, legal: {full_order(order)!r}, or {name!r} at another place"
            )
    return reasons


def _pipelines_differ(order: str, sizes: Mapping[str, int]) -> list[str]:
    """A rank must sit in one and the same pipeline in both views (arXiv 2504.14960).

    The pipeline groups of a view are all the progressions of pp ranks with the stride of pp, so
    they are the same exactly when the strides are.
    """
    views = (view_axes(order, experts=False), view_axes(order, experts=True))
    before = [axes[: axes.index("pp")] for axes in views]
    strides = [prod(sizes[axis] for axis in axes) for axes in before]
    if sizes["pp"] == 1 or strides[0] == strides[1]:
        return []
    found = [
        _describe_stride(axes, stride, sizes["pp"])
        for axes, stride in zip(before, strides, strict=True)
    ]
    last = "-".join([name for name in full_order(order).split("-") if name != "pp"] + ["pp"])
    return [
        f"order {order!r} gives pp={sizes['pp']} the rank stride {found[0]} for attention but"
        f" {found[1]} for experts, and both views must have the same pipeline groups;"
        f" legal: put pp last (order={last!r}), or choose degrees that make the strides equal"
    ]


def _describe_stride(axes: Iterable[str], stride: int, count: int) -> str:
    """Such as ``"tp*cp = 4 (first group [0, 4])"``."""
    factors = "*".join(axes)
    shown = [str(i * stride) for i in range(min(count, 4))] + ["..."] * (count > 4)
    return (f"{factors} = " if factors else "") + f"{stride} (first group [{', '.join(shown)}])"
