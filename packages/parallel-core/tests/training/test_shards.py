"""Token folders: shard borders do not show, damage does."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from fivefold.parallel_core.errors import DataError
from fivefold.parallel_core.training.shards import MappedTokens, ShardWriter, TokenDataset

TOKENS = np.random.default_rng(0).integers(0, 70_000, 1000)


def make(
    folder: Path, shard_tokens: int, dtype: str = "uint32", ids: np.ndarray = TOKENS
) -> TokenDataset:
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder, "train", dtype, shard_tokens)
    for part in np.array_split(ids, 7):
        writer.write(part)
    both = {"train": 1, "heldout": 0}
    dataset = TokenDataset(
        folder=folder,
        fingerprint="f",
        dtype=dtype,
        vocab_size=70_000,
        end_of_text_id=0,
        shards={"train": writer.close(), "heldout": ()},
        num_documents=both,
        num_bytes=both,
        num_files=1,
        num_duplicates=2,
        num_skipped_files=3,
        num_skipped_lines=4,
    )
    dataset.save()
    return dataset


@pytest.mark.parametrize("shard_tokens", [1, 7, 100, 999, 1000, 1001])
def test_slices_cross_shard_borders(tmp_path: Path, shard_tokens: int) -> None:
    dataset = make(tmp_path, shard_tokens)
    assert [shard.num_tokens for shard in dataset.shards["train"]][:-1] == (
        [shard_tokens] * (-(-1000 // shard_tokens) - 1)
    )
    tokens = MappedTokens(tmp_path)
    assert len(tokens) == dataset.num_tokens("train") == 1000
    rng = np.random.default_rng(1)
    for start, stop in [(0, 1000), (0, 0), (1000, 2000), (5, 3), *rng.integers(0, 1001, (50, 2))]:
        np.testing.assert_array_equal(tokens[start:stop], TOKENS[start:stop])
    np.testing.assert_array_equal(tokens[-10:], TOKENS[-10:])


def test_slices_are_copies_in_the_stored_type(tmp_path: Path) -> None:
    make(tmp_path, 64, "uint16", TOKENS % 60_000)
    tokens = MappedTokens(tmp_path)
    piece = tokens[3:5]
    assert piece.dtype == np.uint16
    piece[:] = 0
    np.testing.assert_array_equal(tokens[3:5], TOKENS[3:5] % 60_000)
    assert (tmp_path / "train-00000.bin").read_bytes() == (TOKENS[:64] % 60_000).astype(
        "<u2"
    ).tobytes()
    with pytest.raises(DataError, match="step 1, asked for 2"):
        tokens[::2]


def test_index_survives_the_round_trip(tmp_path: Path) -> None:
    dataset = make(tmp_path, 300)
    assert TokenDataset.load(tmp_path) == dataset
    assert "1 files: 1,000 tokens to train on" in dataset.summary()
    assert "2 copies, 3 unreadable files, 4 bad lines" in dataset.summary()


def test_pickling_sends_the_place_not_the_tokens(tmp_path: Path) -> None:
    make(tmp_path, 300)
    data = pickle.dumps(MappedTokens(tmp_path))
    assert len(data) < 1000
    np.testing.assert_array_equal(pickle.loads(data)[:], TOKENS)


def test_an_opened_folder_may_be_deleted(tmp_path: Path) -> None:
    make(tmp_path, 300)
    tokens = MappedTokens(tmp_path)
    for file in tmp_path.iterdir():
        file.unlink()
    np.testing.assert_array_equal(tokens[:], TOKENS)


def test_damage_names_the_file_and_the_sizes(tmp_path: Path) -> None:
    make(tmp_path, 300)
    shard = tmp_path / "train-00001.bin"
    whole = shard.read_bytes()
    for content, found in ((whole[:-3], 1197), (whole + b"xx", 1202), (b"", 0)):
        shard.write_bytes(content)
        with pytest.raises(
            DataError, match=rf"train-00001\.bin should have 1200 bytes .* but has {found}:"
        ):
            MappedTokens(tmp_path)
    shard.unlink()
    with pytest.raises(DataError, match=r"train-00001\.bin should have 1200 .* but is missing"):
        MappedTokens(tmp_path)


def test_no_index_bad_index_no_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no prepared tokens in .*: it has no index\.json"):
        MappedTokens(tmp_path / "nowhere")
    make(tmp_path, 300)
    with pytest.raises(DataError, match="no heldout tokens: prepared with heldout_fraction 0"):
        MappedTokens(tmp_path, "heldout")
    with pytest.raises(DataError, match=r"no split 'test' in .*: there are train and heldout"):
        MappedTokens(tmp_path, "test")
    index = tmp_path / "index.json"
    good = json.loads(index.read_text())
    index.write_text(json.dumps(good | {"format": 9}))
    with pytest.raises(DataError, match=r"index\.json is of format 9, this reads 1"):
        MappedTokens(tmp_path)
    del good["dtype"]
    for content in ("{", "[]", json.dumps(good), json.dumps(good | {"surprise": 1})):
        index.write_text(content)
        with pytest.raises(DataError, match=r"index\.json is damaged"):
            MappedTokens(tmp_path)
