"""The laws of machine code, and what counts as worse."""

from dataclasses import replace

import pytest

from fivefold.kernels.offline.compare import broken_laws, compare
from fivefold.kernels.offline.records import Record

NORM = Record(
    package="kernels",
    op="rms_norm",
    kernel="_forward_kernel",
    target="sm_90a",
    sample="4096x4096",
    dtype="bfloat16",
    variant=0,
    num_warps=4,
    num_stages=2,
    registers=62,
    spill_bytes=0,
    shared_bytes=16,
    tensor_core={},
    load_bytes=16,
    store_bytes=16,
    narrow_loads=0.1,
    narrow_stores=0.0,
    lost_load_bytes=0,
    lost_store_bytes=0,
    moved_bytes=2**26,
    has_dot=False,
    needs_tensor_cores=False,
    needs_wide=True,
    compiler="triton 3.9.0",
)
MATMUL = replace(
    NORM,
    op="grouped_mm",
    tensor_core={"HGMMA": 4},
    has_dot=True,
    needs_tensor_cores=True,
    needs_wide=False,
)


@pytest.mark.parametrize("record", [NORM, MATMUL])
def test_good_kernels(record: Record) -> None:
    assert broken_laws(record) == []


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        (replace(NORM, spill_bytes=8), "spills 8 bytes"),
        (replace(MATMUL, tensor_core={}), "no tensor cores instead of HGMMA"),
        (replace(MATMUL, tensor_core={"HMMA": 4}), "4 HMMA instead of HGMMA"),
        (replace(MATMUL, target="sm_100"), "4 HGMMA instead of UTCHMMA"),
        (replace(NORM, load_bytes=8, store_bytes=4), "loads 8 and stores 4 bytes at once"),
        (replace(NORM, lost_load_bytes=64), "loads 64 bytes of its tiles by less than 16"),
        (replace(NORM, lost_store_bytes=32), "stores 32 bytes of its tiles by less than 16"),
    ],
)
def test_faults(record: Record, fault: str) -> None:
    (found,) = broken_laws(record)
    assert fault in found


@pytest.mark.parametrize(
    "record",
    [
        replace(NORM, load_bytes=4, store_bytes=4, moved_bytes=1000),
        replace(NORM, load_bytes=4, store_bytes=4, needs_wide=False),
        replace(NORM, store_bytes=4, narrow_stores=1.0),
        replace(MATMUL, load_bytes=4, lost_load_bytes=64, needs_wide=False),
        replace(MATMUL, target="sm_80", tensor_core={"HMMA": 4}),
        replace(MATMUL, tensor_core={"QGMMA": 4}),
        replace(MATMUL, tensor_core={}, needs_tensor_cores=False),
    ],
    ids=["small", "indices", "statistics", "no matter", "sm_80", "float8", "exact float32"],
)
def test_no_faults(record: Record) -> None:
    assert broken_laws(record) == []


@pytest.mark.parametrize(
    ("before", "now", "complaint"),
    [
        (NORM, replace(NORM, spill_bytes=4), "spills 4 bytes, before 0"),
        (MATMUL, replace(MATMUL, tensor_core={"HMMA": 4}), "has lost HGMMA: 4 HMMA"),
        (NORM, replace(NORM, load_bytes=8), "loads 8 bytes at most, before 16"),
        (NORM, replace(NORM, store_bytes=2), "stores 2 bytes at most, before 16"),
        (NORM, replace(NORM, narrow_loads=0.4), "loads 40% of its bytes narrowly, before 10%"),
        (NORM, replace(NORM, narrow_stores=0.1), "stores 10% of its bytes narrowly, before 0%"),
    ],
)
def test_worse(before: Record, now: Record, complaint: str) -> None:
    assert compare([now], [before]).worse == [f"{now.title}: {complaint}"]
    better = compare([before], [now])
    assert not better.worse and not better.notes


def test_more_registers_and_another_compiler_are_worth_a_note() -> None:
    now = replace(NORM, registers=70, compiler="triton 3.6.0")
    found = compare([now, replace(now, variant=1)], [NORM, replace(NORM, variant=1)])
    assert not found.worse
    assert found.notes == [
        "compiled by triton 3.6.0, before by triton 3.9.0",
        f"{now.title}: 70 registers, before 62",
        f"{replace(now, variant=1).title}: 70 registers, before 62",
    ]


def test_kernels_in_one_of_both_are_named() -> None:
    new, old = replace(NORM, kernel="new"), replace(NORM, kernel="old")
    found = compare([NORM, new], [NORM, old])
    assert (found.unknown, found.gone) == ([new.title], [old.title])


def test_other_ops_and_targets_of_the_table_do_not_matter() -> None:
    found = compare([NORM], [NORM, MATMUL, replace(NORM, target="sm_80")])
    assert not (found.gone or found.unknown or found.worse or found.notes)
