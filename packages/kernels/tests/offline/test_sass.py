"""Reading machine code, on lines as cuobjdump prints them."""

import pytest

from fivefold.kernels.offline import sass


def listing(*instructions: str) -> str:
    head = '\tcode for sm_90a\n\t\tFunction : _kernel\n\t.headerflags\t@"EF_CUDA_SM90"\n'
    lines = (
        f"        /*{16 * i:04x}*/              {text} ;      /* 0x0000000c0c12b981 */\n"
        "                                            /* 0x000fe20000000800 */"
        for i, text in enumerate(instructions)
    )
    return head + "\n".join(lines) + "\n\t\t..........\n"


def test_a_memory_bound_kernel() -> None:
    found = sass.read(
        listing(
            "LDC R1, c[0x0][0x28]",
            "@!P3 LDG.E.128 R64, desc[UR16][R6.64]",
            "@!P3 LDG.E.EF.128.CONSTANT R68, desc[UR16][R8.64]",
            "LDG.E R112, [R76.64]",
            "LDG.E.U16 R112, [R76.64]",
            "@P0 STG.E.64 desc[UR16][R70.64], R72",
            "@!UP2 STG.E.U8 desc[UR16][R70.64], R72",
            "RED.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R5",
            "LDS.128 R4, [R5]",
            "EXIT",
        )
    )
    assert (found.load_bytes, found.store_bytes) == (16, 8)
    assert (found.wide_load_bytes, found.wide_store_bytes) == (32, 0)
    assert found.narrow_loads == pytest.approx(6 / 38, abs=1e-4)
    assert found.narrow_stores == 1
    assert found.spill_bytes == 0
    assert found.tensor_core == {}


def test_spills_are_local_loads_and_stores() -> None:
    found = sass.read(
        listing(
            "STL.64 [R1+0x8], R4", "@P1 STL [R1], R4", "LDL.LU.128 R4, [R1+0x10]", "STS [R1], R2"
        )
    )
    assert found.spill_bytes == 8 + 4 + 16
    assert (found.load_bytes, found.store_bytes) == (0, 0)


@pytest.mark.parametrize(
    ("instruction", "name"),
    [
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", "HMMA"),
        ("HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8].tnspB, R24, gsb0", "HGMMA"),
        ("QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR8], R24", "QGMMA"),
        ("IMMA.16832.S8.S8 R4, R8.ROW, R12.COL, R4", "IMMA"),
        ("@P1 UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR5], tmem[UR16], idesc[UR17], UP0", "UTCHMMA"),
        (
            "UTCQMMA.2CTA gdesc[UR8], gdesc[UR10], tmem[UR5], tmem[UR16], idesc[UR17], UP0",
            "UTCQMMA",
        ),
        ("DMMA.8x8x4 R4, R8, R12, R4", "DMMA"),
    ],
)
def test_tensor_cores(instruction: str, name: str) -> None:
    assert sass.read(listing(instruction, instruction)).tensor_core == {name: 2}


def test_no_other_instruction_is_taken_for_a_tensor_core() -> None:
    others = (
        "FFMA R1, R2, R3, R4",
        "HFMA2.BF16 R1, R2, R3, R4",
        "UTCBAR [UR4], URZ",
        "UTCATOMSWS R1",
    )
    assert sass.read(listing(*others)).tensor_core == {}


@pytest.mark.parametrize(
    ("instruction", "loads", "stores"),
    [
        ("LDGSTS.E.BYPASS.128 [R5+0x2000], desc[UR8][R2.64]", 16, 0),
        ("LDGSTS.E [R5+0x2000], desc[UR8][R2.64]", 4, 0),
        ("LDG.E.ENL2.256 R8, R4, desc[UR4][R2.64]", 32, 0),
        ("STG.E.ENL2.256 desc[UR4][R2.64], R8, R4", 0, 32),
        ("LD.E.64 R2, desc[UR4][R2.64]", 8, 0),
        ("ST.E.U16 desc[UR4][R2.64], R5", 0, 2),
        ("@P0 UTMALDG.2D [UR8], [UR6], desc[UR10]", 16, 0),
        ("UTMASTG.2D [UR8], [UR6]", 0, 16),
        ("UBLKCP.S.G [UR8], [UR6], UR4, desc[UR10]", 16, 0),
        ("UBLKCP.G.S [UR8], [UR6], UR4", 0, 16),
    ],
)
def test_widths(instruction: str, loads: int, stores: int) -> None:
    found = sass.read(listing(instruction))
    assert (found.load_bytes, found.store_bytes) == (loads, stores)


def test_nothing_is_no_code() -> None:
    found = sass.read("")
    assert (found.load_bytes, found.spill_bytes, found.narrow_loads) == (0, 0, 0)
