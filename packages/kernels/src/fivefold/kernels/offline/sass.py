"""Read machine code as ``cuobjdump -sass`` prints it.

What counts as an access of global memory: loads and stores of registers (``LDG``, ``STG``, and
generic ``LD``, ``ST``), copies to shared memory (``LDGSTS``), and those of the tensor memory
accelerator (``UTMA``, ``UBLKCP``), which moves whole lines and counts as 16 bytes. Atomics do not
count.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

# Bytes of a thread's access that a memory bus can do no better than.
WIDE = 16

# A line such as "/*0260*/  @!P3 LDG.E.128 R64, desc[UR16][R6.64] ;".
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_TENSOR_CORE = re.compile(r"^(?:[HIQDO]MMA|[HIQ]GMMA|UTC[A-Z]*MMA)$")
_LOADS = {"LDG", "LD", "LDGSTS", "UTMALDG", "UBLKCP", "UBLKPF"}
_STORES = {"STG", "ST", "UTMASTG", "UTMAREDG"}
_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineCode:
    """What the instructions of a kernel show; counts are of instructions and not of executions.

    Attributes:
        tensor_core: how many instructions of each kind that tensor cores execute.
        spill_bytes: that a thread moves between registers and local memory.
        load_bytes: the widest load of a thread from global memory; 0 without loads.
        store_bytes: the same of stores.
        wide_load_bytes: that all loads of at least 16 bytes move, in a thread.
        wide_store_bytes: the same of stores.
        narrow_loads: share of the bytes loaded that narrower loads than 16 bytes move.
        narrow_stores: the same of stores.
    """

    tensor_core: dict[str, int]
    spill_bytes: int
    load_bytes: int
    store_bytes: int
    wide_load_bytes: int
    wide_store_bytes: int
    narrow_loads: float
    narrow_stores: float


def read(text: str) -> MachineCode:
    """The facts of one kernel's listing."""
    tensor_core: Counter[str] = Counter()
    loads: list[int] = []
    stores: list[int] = []
    spilled = 0
    for name, *modifiers in _instructions(text):
        size = _bytes(name, modifiers)
        if _TENSOR_CORE.match(name):
            tensor_core[name] += 1
        elif name in ("STL", "LDL"):
            spilled += size
        elif name in _STORES or (name == "UBLKCP" and modifiers[:2] == ["G", "S"]):
            stores.append(size)
        elif name in _LOADS:
            loads.append(size)
    return MachineCode(
        tensor_core=dict(sorted(tensor_core.items())),
        spill_bytes=spilled,
        load_bytes=max(loads, default=0),
        store_bytes=max(stores, default=0),
        wide_load_bytes=sum(size for size in loads if size >= WIDE),
        wide_store_bytes=sum(size for size in stores if size >= WIDE),
        narrow_loads=_narrow_share(loads),
        narrow_stores=_narrow_share(stores),
    )


def _instructions(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        found = _INSTRUCTION.match(line)
        if found is not None:
            yield found[1].split(".")


def _bytes(name: str, modifiers: list[str]) -> int:
    """Of one thread's access."""
    if name.startswith(("UTMA", "UBLK")):
        return WIDE
    bits = [_BITS[modifier] for modifier in modifiers if modifier in _BITS]
    return bits[-1] // 8 if bits else 4


def _narrow_share(accesses: list[int]) -> float:
    narrow = sum(size for size in accesses if size < WIDE)
    return round(narrow / sum(accesses), 4) if accesses else 0.0
