"""Read from Triton's own form of a kernel which tiles it loads and stores.

A tile that gives each thread 16 bytes or more can go through accesses of 16 bytes, if the compiler
knows enough of its addresses and mask. Whether it did shows in the machine code.
"""

import math
import re
from collections.abc import Iterator

from fivefold.kernels.offline.sass import WIDE

# An access such as "%x = tt.load %p, %mask : tensor<1x4096x!tt.ptr<bf16>>".
_ACCESS = re.compile(r"tt\.(load|store)\b.*: tensor<((?:\d+x)+)!tt\.ptr<[a-zA-Z]+(\d+)")
_QUOTED = re.compile(r'"[^"]*"')
_BALANCED = re.compile(r"\{[^{}]*\}")


def bytes_of(ttir: str, what: str, threads: int) -> int:
    """What each thread has of all tiles with at least 16 bytes for each of them.

    A branch outside of any loop does not count where there is other code: it is the rest that a
    loop over whole blocks leaves, and runs once.

    Args:
        ttir: the kernel in Triton's form.
        what: ``load`` or ``store``.
        threads: of a program.
    """
    usual = rest = 0
    for found, size, path in _accesses(ttir):
        share = size // threads
        if found != what or share < WIDE:
            continue
        if "for" in path or "if" not in path:
            usual += share
        else:
            rest += share
    return usual or rest


def _accesses(ttir: str) -> Iterator[tuple[str, int, list[str]]]:
    """Kind, bytes, and the loops and branches around each access of a tile."""
    path: list[str] = []
    for line in ttir.splitlines():
        found = _ACCESS.search(line)
        if found is not None:
            values = math.prod(map(int, found[2].rstrip("x").split("x")))
            yield found[1], values * int(found[3]) // 8, path
        for brace in re.sub(r"[^{}]", "", _without_pairs(_QUOTED.sub("", line))):
            if brace == "}":
                path.pop()
            else:
                path.append(_kind(line))


def _kind(line: str) -> str:
    if "scf.for" in line or "scf.while" in line or line.lstrip().startswith("} do {"):
        return "for"
    return "if" if "scf.if" in line or "else" in line else ""


def _without_pairs(line: str) -> str:
    """Without attributes, whose braces close on the same line."""
    if line.lstrip().startswith("}"):
        # The first closes what an earlier line opened.
        indent = line.index("}")
        return "}" + _without_pairs(line[indent + 1 :])
    shorter = _BALANCED.sub("", line)
    return shorter if shorter == line else _without_pairs(shorter)
