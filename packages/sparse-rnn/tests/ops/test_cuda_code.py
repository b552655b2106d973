"""What the persistent kernel's machine code is like, compiled for sm_90a without a GPU."""

import re
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import pytest

from fivefold.kernels import cuda_route
from fivefold.kernels.offline import sass
from fivefold.kernels.offline.tools import dump
from fivefold.sparse_rnn.ops.recurrence.cuda import SOURCE
from fivefold.sparse_rnn.resident import Kernel

pytest.importorskip("triton")
pytest.importorskip("cuda.core")

LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([^;]*?)\s*;")
BRANCH = re.compile(r"^BRA\S*\s.*?0x([0-9a-f]+)$")

# An LSTM of 2304 units: 18 in each of 128 blocks, 72 rows, 9 runs of each of 8 warps.
LSTM = Kernel(
    cell="lstm",
    backward=False,
    barrier=False,
    hidden=2304,
    width=4,
    kind="bfloat16",
    source="bfloat16",
    most_units=18,
    num_warps=8,
    shape=(22, 22, 22, 21, 21, 21, 21, 21, 21),
)
KERNELS = {
    "forward": LSTM,
    "backward": replace(LSTM, backward=True),
    "barrier": replace(LSTM, barrier=True),
    "overflow": replace(LSTM, cell="gru", shape=(30,) * 9),
    "float32": replace(LSTM, kind="float32", source="float32", shape=(12,) * 8),
    "small": replace(LSTM, cell="rnn_tanh", width=1, most_units=8, shape=(8,) * 4),
}


class Code(NamedTuple):
    """A kernel's registers, spilled bytes and instructions by address."""

    registers: int
    spill_bytes: int
    instructions: list[tuple[int, str]]

    def between(self, first: int, last: int) -> Counter[str]:
        """Instructions of a range without their operands."""
        return Counter(text.split()[0] for at, text in self.instructions if first <= at <= last)

    @property
    def time_loop(self) -> tuple[int, int]:
        """The longest loop."""
        found = [(at, BRANCH.match(text)) for at, text in self.instructions]
        loops = [(int(match[1], 16), at) for at, match in found if match is not None]
        return max(loops, key=lambda loop: loop[1] - loop[0])

    @property
    def products(self) -> tuple[int, int]:
        """Between the two barriers of the block where the nonzeros are multiplied."""
        barriers = [at for at, text in self.instructions if text.startswith("BAR.SYNC")]
        pairs = pairwise(barriers)
        return max(pairs, key=lambda pair: self.between(*pair)["LDS.128"])


@cache
def _code(name: str, arch: str = "sm_90a") -> Code:
    kernel = KERNELS[name]
    program = cuda_route.load(SOURCE, defines=kernel.defines())
    function = "recurrence_backward" if kernel.backward else "recurrence_forward"
    found = dump(program.cubin(arch), function, int(arch[3:5]))
    lines = map(LINE.match, found.listing.splitlines())
    instructions = [(int(line[1], 16), line[2]) for line in lines if line is not None]
    return Code(found.registers, sass.read(found.listing).spill_bytes, instructions)


@pytest.mark.parametrize("name", KERNELS)
def test_nothing_spills(name: str) -> None:
    code = _code(name)
    assert code.spill_bytes == 0
    assert KERNELS[name].register_pairs < code.registers <= 255


@pytest.mark.parametrize("name", ["forward", "backward", "barrier"])
def test_each_pair_is_one_wide_load_and_four_multiplications(name: str) -> None:
    pairs = KERNELS[name].register_pairs
    assert pairs == 192
    code = _code(name)
    found = code.between(*code.products)
    assert found["LDS.128"] == pairs
    assert found["FFMA"] == 4 * pairs
    # Offset and value out of the word, and where the vector begins, which is added.
    integer = ("LOP3.LUT", "IADD3", "IMAD.IADD", "VIADD")
    assert sum(found[each] for each in integer) <= 3.1 * pairs
    # Whether to give up, and backwards where each run's columns begin.
    assert found["LDS"] <= 1 + 2 * len(KERNELS[name].shape) * KERNELS[name].backward
    assert not any(each.startswith(("LDG", "LD.", "LDL", "LDC")) for each in found)


@pytest.mark.parametrize("name", ["forward", "backward", "overflow", "float32"])
def test_weights_are_loaded_before_the_first_step(name: str) -> None:
    code, kernel = _code(name), KERNELS[name]
    begin, end = code.time_loop
    within = code.between(begin, end)
    loads = [each for each in within if each.startswith(("LDG", "LD."))]
    # Only words of other blocks, and what units read of their inputs, which no register waits for.
    assert set(loads) <= {
        "LDG.E.128.STRONG.GPU",
        "LDG.E.STRONG.GPU",
        "LDGSTS.E",
        "LDGDEPBAR",
    }
    before = code.between(0, begin)
    words = kernel.register_pairs * (1 + kernel.wide)
    assert before["LDG.E"] + before["LDG.E.CONSTANT"] >= words
    assert within["LDS.128"] >= kernel.register_pairs


@pytest.mark.parametrize("name", ["forward", "backward", "overflow", "float32"])
def test_words_are_looked_at_without_fences(name: str) -> None:
    code = _code(name)
    everything = code.between(0, code.instructions[-1][0])
    begin, end = code.time_loop
    assert code.between(begin, end)["LDG.E.128.STRONG.GPU"] >= 4
    assert code.between(begin, end)["STG.E.STRONG.GPU"] >= 1
    fences = ("MEMBAR", "CCTL", "ERRBAR", "ATOM", "RED", "FENCE")
    assert not any(each.startswith(fences) for each in everything)


@pytest.mark.parametrize("name", KERNELS)
def test_registers_are_as_planned(name: str) -> None:
    assert abs(_code(name).registers - KERNELS[name].registers) <= 8


def test_a_barrier_of_the_grid_takes_fences() -> None:
    code = _code("barrier")
    within = code.between(*code.time_loop)
    assert within["MEMBAR.SC.GPU"] >= 1 and within["REDG.E.ADD.STRONG.GPU"] == 1


def test_the_backward_of_sm_80_does_not_spill_either() -> None:
    assert _code("backward", "sm_80").spill_bytes == 0
