"""Words of nonzeros: exact, whatever the values, and wide where they must be."""

import pytest
import torch

from fivefold.sparse_rnn import SparseRNNInputError
from fivefold.sparse_rnn.pack import pack, unpack

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("element_bytes", [4, 8, 16])
def test_unpacking_gives_back_every_bit(dtype: torch.dtype, element_bytes: int) -> None:
    tiny = torch.finfo(dtype).smallest_normal / 4
    special = [0.0, -0.0, tiny, -tiny, torch.finfo(dtype).max, torch.inf, -torch.inf]
    values = torch.cat([torch.randn(500), torch.tensor(special)]).to(dtype)
    col = torch.randint(0, 4096 * 4 // element_bytes, values.shape, dtype=torch.int32)
    col[0] = 65535 // element_bytes
    packed = pack(values, col, element_bytes=element_bytes)
    assert packed.wide == (dtype == torch.float32)
    found, columns = unpack(packed)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(found.view(bits), values.view(bits))
    assert torch.equal(columns, col)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_offset_beyond_16_bits_makes_words_wide(dtype: torch.dtype) -> None:
    values = torch.randn(3).to(dtype)
    assert not pack(values, torch.tensor([0, 1, 4095]), element_bytes=16).wide
    col = torch.tensor([0, 4096, 1], dtype=torch.int32)
    packed = pack(values, col, element_bytes=16)
    assert packed.wide
    found, columns = unpack(packed)
    assert torch.equal(found, values) and torch.equal(columns, col)


def test_too_large_for_float16_is_an_error_and_fits_bfloat16() -> None:
    values, col = torch.tensor([1.0, 70000.0]), torch.tensor([0, 1])
    with pytest.raises(SparseRNNInputError, match="1 values are too large for torch"):
        pack(values, col, element_bytes=4, dtype=torch.float16)
    found, _ = unpack(pack(values, col, element_bytes=4, dtype=torch.bfloat16))
    assert torch.equal(found, values.bfloat16())


def test_offsets_have_31_bits() -> None:
    with pytest.raises(SparseRNNInputError, match="offsets have 31 bits"):
        pack(torch.ones(1), torch.tensor([1 << 27]), element_bytes=16)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(SparseRNNInputError, match="legal: float16, bfloat16, float32"):
        pack(torch.ones(1).double(), torch.tensor([0]), element_bytes=4)
