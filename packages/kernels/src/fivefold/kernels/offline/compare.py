"""What machine code has to be like, and whether it got worse since a table was written."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from fivefold.kernels.offline.records import Key, Record
from fivefold.kernels.offline.sass import WIDE

# Kernels that move less need not be wide: a launch costs more.
_SMALL_BYTES = 2**20

# Scalars make the narrow share of a small kernel jump, by as much as this without harm.
_ALLOWED_NARROW = 0.05

# Only this target's own matrix instructions are as fast as the target.
_OWN_TENSOR_CORES = {
    "sm_90a": {"HGMMA", "IGMMA", "QGMMA"},
    "sm_100": {"UTCHMMA", "UTCIMMA", "UTCQMMA", "UTCOMMA"},
}


def broken_laws(record: Record) -> list[str]:
    """What is wrong: spills, no tensor cores where they belong, narrow accesses elsewhere."""
    broken = []
    if record.spill_bytes:
        broken.append(f"spills {record.spill_bytes} bytes of {record.registers} registers")
    own = _own(record.target)
    if record.needs_tensor_cores and not own & record.tensor_core.keys():
        broken.append(
            f"multiplies matrices with {_listed(record.tensor_core)} instead of "
            f"{' or '.join(sorted(own))}"
        )
    if record.needs_wide and record.moved_bytes >= _SMALL_BYTES:
        broken += _narrow(record)
    return broken


def _narrow(record: Record) -> list[str]:
    if max(record.load_bytes, record.store_bytes) < WIDE:
        return [
            f"loads {record.load_bytes} and stores {record.store_bytes} bytes at once, "
            f"neither of them {WIDE}"
        ]
    lost = {"loads": record.lost_load_bytes, "stores": record.lost_store_bytes}
    return [
        f"{what} {size} bytes of its tiles by less than {WIDE} at once"
        for what, size in lost.items()
        if size
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What differs from a table.

    Attributes:
        worse: what got worse.
        notes: what differs otherwise.
        unknown: kernels that the table lacks.
        gone: kernels that only the table has.
    """

    worse: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)


def compare(records: Sequence[Record], table: Sequence[Record]) -> Comparison:
    """Compare with a table of earlier records, as far as it is about the same ops and targets."""
    now: dict[Key, Record] = {record.key: record for record in records}
    ops = {(record.package, record.op) for record in records}
    targets = {record.target for record in records}
    before: dict[Key, Record] = {
        record.key: record
        for record in table
        if (record.package, record.op) in ops and record.target in targets
    }
    found = Comparison(
        unknown=[now[key].title for key in sorted(now.keys() - before.keys())],
        gone=[before[key].title for key in sorted(before.keys() - now.keys())],
    )
    for key in sorted(now.keys() & before.keys()):
        _compare_one(now[key], before[key], found)
    return found


def _compare_one(now: Record, before: Record, found: Comparison) -> None:
    worse = []
    if now.spill_bytes > before.spill_bytes:
        worse.append(f"spills {now.spill_bytes} bytes, before {before.spill_bytes}")
    lost = _lost(now, before)
    if lost:
        worse.append(f"has lost {', '.join(sorted(lost))}: {_listed(now.tensor_core)}")
    for what in ("load", "store"):
        worse += _narrower(what, now, before)
    found.worse.extend(f"{now.title}: {each}" for each in worse)
    compilers = f"compiled by {now.compiler}, before by {before.compiler}"
    if now.compiler != before.compiler and compilers not in found.notes:
        found.notes.append(compilers)
    if now.registers > before.registers:
        found.notes.append(f"{now.title}: {now.registers} registers, before {before.registers}")


def _lost(now: Record, before: Record) -> set[str]:
    """Tensor-core instructions that are gone, except for older ones that gave way to better."""
    lost = before.tensor_core.keys() - now.tensor_core.keys()
    own = _own(now.target)
    return lost & own if own & now.tensor_core.keys() else lost


def _own(target: str) -> set[str]:
    return _OWN_TENSOR_CORES.get(target, {"HMMA", "IMMA", "QMMA"})


def _narrower(what: str, now: Record, before: Record) -> list[str]:
    widest, widest_before = (getattr(r, f"{what}_bytes") for r in (now, before))
    share, share_before = (getattr(r, f"narrow_{what}s") for r in (now, before))
    if widest < widest_before:
        return [f"{what}s {widest} bytes at most, before {widest_before}"]
    if share > share_before + _ALLOWED_NARROW:
        return [f"{what}s {share:.0%} of its bytes narrowly, before {share_before:.0%}"]
    return []


def _listed(tensor_core: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in tensor_core.items()) or "no tensor cores"
