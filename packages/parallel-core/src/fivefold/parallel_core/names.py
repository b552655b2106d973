"""Patterns of module names: ``layers.*.attention`` where ``*`` stands for one part."""

import re
from collections.abc import Iterable
from functools import cache


def matching(name: str, patterns: Iterable[str]) -> list[str]:
    """The patterns that a dotted name falls under."""
    return [pattern for pattern in patterns if _compiled(pattern).fullmatch(name)]


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", "[^.]+"))
