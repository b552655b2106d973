"""What to change where nothing is legal or nothing fits: the nearest choice that would do."""

from collections.abc import Callable, Iterable, Iterator
from itertools import combinations, product
from math import lcm, log

from fivefold.parallel_core.config import replace
from fivefold.parallel_core.errors import ConfigError, LayoutError
from fivefold.parallel_core.layout_rules import explain_illegal
from fivefold.parallel_core.planner.models import ModelShape
from fivefold.parallel_core.planner.setup import Setup, check, divisors

DEGREES = ("tp", "cp", "pp", "ep", "etp")
_CHOSEN = (*DEGREES, "microbatch")
_GIVEN = ("world_size", "global_batch", "length")
_MOST = 8
"""Values of a field that are tried, the nearest first."""


def require_legal(model: ModelShape, setup: Setup) -> None:
    """Check a mapping that a user asked for.

    Raises:
        ConfigError: it cannot run; one line says why, and the nearest mapping that can.
    """
    try:
        check(model, setup)
    except (ConfigError, LayoutError) as error:
        reason = _first_reason(setup) or str(error)
        found = nearest(model, setup)
        ways = f"; the nearest that can run: {', or '.join(found)}" if found else ""
        raise ConfigError(f"{reason}{ways}") from None


def _first_reason(setup: Setup) -> str:
    """Of a layout, without its list of other ways out, which know nothing of the model."""
    degrees = {name: getattr(setup, name) for name in DEGREES}
    lines = explain_illegal(setup.world_size, **degrees).splitlines()
    return lines[1].strip(" -").split("; nearest legal")[0] if len(lines) > 1 else ""


def is_legal(model: ModelShape, setup: Setup) -> bool:
    """Whether a mapping can run."""
    try:
        check(model, setup)
    except (ConfigError, LayoutError):
        return False
    return True


def nearest(model: ModelShape, setup: Setup) -> list[str]:
    """Fewest and smallest changes that make a mapping legal.

    Returns:
        Changes of degrees, such as "tp=4, pp=2", and a change of what was given to train on, such
        as "global_batch=64"; none where nothing near is legal.
    """
    found = []
    for count in (1, 2, 3):
        changes = _best(model, setup, _CHOSEN, count)
        if changes:
            found.append(_words(changes))
            break
    for name in _GIVEN:
        changes = _best(model, setup, (name,), 1)
        found += [_words(changes)] if changes else []
    return found


def _words(changes: dict[str, int]) -> str:
    return ", ".join(f"{name}={value}" for name, value in changes.items())


def _best(model: ModelShape, setup: Setup, names: Iterable[str], count: int) -> dict[str, int]:
    """The least change of ``count`` fields that is legal; empty where there is none."""
    values = {name: _candidates(setup, name) for name in names}
    tried = [
        dict(zip(chosen, new, strict=True))
        for chosen in combinations(values, count)
        for new in product(*(values[name] for name in chosen))
    ]
    tried.sort(key=lambda changes: sum(_far(setup, n, v) for n, v in changes.items()))
    return next((new for new in tried if is_legal(model, replace(setup, **new))), {})


def _far(setup: Setup, name: str, value: int) -> float:
    return abs(log(value / max(1, getattr(setup, name))))


def _candidates(setup: Setup, name: str) -> list[int]:
    """Other values of a field that its neighbours could agree with, the nearest first."""
    now: int = getattr(setup, name)
    if name == "microbatch":
        values = divisors(setup.global_batch)
    elif name in DEGREES:
        values = divisors(setup.world_size)
    else:
        step = _step(setup, name)
        values = [step * n for n in range(max(1, now // step - 1), now // step + setup.pp + 2)]
    return sorted((v for v in values if v != now), key=lambda v: _far(setup, name, v))[:_MOST]


def _step(setup: Setup, name: str) -> int:
    """What a field must be a multiple of."""
    if name == "world_size":
        return lcm(setup.tp * setup.cp * setup.pp, setup.etp * setup.ep * setup.pp)
    if name == "global_batch":
        rounds = setup.pp if setup.pipeline.stages_per_rank > 1 else 1
        return max(1, setup.dp) * setup.microbatch * rounds
    return setup.parts


def around(now: int, step: int) -> Iterator[int]:
    """Numbers near ``now``, the nearest first, then its neighbours among multiples of ``step``."""
    for away in range(1, 65):
        yield from (v for v in (now - away, now + away) if v > 0)
    yield from (step * max(1, now // step + n) for n in range(5))


def first_that_fits(
    sizes: Iterable[int], least: Callable[[int], int | None], usable: int
) -> tuple[int, int] | None:
    """The first number of devices on which the leanest mapping fits.

    Args:
        sizes: numbers of devices to try, ascending.
        least: bytes of the leanest mapping on so many, None where none is legal.
        usable: bytes of a device.

    Returns:
        The number, and the bytes; None where none of them will do.
    """
    for size in sizes:
        held = least(size)
        if held is not None and held <= usable:
            return size, held
    return None
