"""Token files: a folder of flat binary shards per split, with an index that says what they hold.

``train-00000.bin``, .., ``heldout-00000.bin``, .. hold little-endian unsigned ids and nothing else;
``index.json`` holds their names and lengths and is written last.
"""

import bisect
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fivefold.parallel_core.errors import DataError
from fivefold.parallel_core.files import write_json
from fivefold.parallel_core.training.split import HELDOUT, SPLITS, TRAIN

INDEX = "index.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Shard:
    """One binary file and the number of tokens in it."""

    name: str
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenDataset:
    """What a folder of token files holds: its ``index.json``.

    The dicts have the keys ``"train"`` and ``"heldout"``.

    Args:
        folder: where the files are.
        fingerprint: of the text, the split and the tokenizer; equal ones mean equal tokens, on
            whichever machine they were made.
        dtype: ``"uint16"`` or ``"uint32"``.
        vocab_size: of the tokenizer; all ids lie below.
        end_of_text_id: the id after each document.
        shards: the files of each split, in order.
        num_documents: distinct documents, or pieces of files too long to be one.
        num_bytes: length in UTF-8 of each split's text.
        num_files: text files that were read.
        num_duplicates: pieces of text left out because an equal one came before.
        num_skipped_files: files left out because they could not be read or are not UTF-8.
        num_skipped_lines: lines of .jsonl files left out because they hold no "text".
    """

    folder: Path
    fingerprint: str
    dtype: str
    vocab_size: int
    end_of_text_id: int
    shards: dict[str, tuple[Shard, ...]]
    num_documents: dict[str, int]
    num_bytes: dict[str, int]
    num_files: int
    num_duplicates: int
    num_skipped_files: int
    num_skipped_lines: int

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "TokenDataset":
        """Read the index of ``folder`` and check the length of every shard.

        Raises:
            DataError: no such folder, a damaged index, or a shard that is missing or cut short.
        """
        path = Path(folder)
        try:
            index: dict[str, Any] = json.loads((path / INDEX).read_text(encoding="utf-8"))
            if (found := index.pop("format")) != FORMAT:
                raise DataError(f"{path / INDEX} is of format {found}, this reads {FORMAT}")
            shards = {
                split: tuple(Shard(**shard) for shard in index.pop("shards_" + split))
                for split in SPLITS
            }
            dataset = cls(folder=path, shards=shards, **index)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(f"no prepared tokens in {path}: it has no {INDEX}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path / INDEX} is damaged: {error!r}") from error
        dataset._check_shards()
        return dataset

    def save(self) -> None:
        """Write ``index.json``; the folder counts as complete from then on."""
        index = asdict(self)
        del index["folder"]
        shards = index.pop("shards")
        index |= {"format": FORMAT} | {"shards_" + split: shards[split] for split in SPLITS}
        write_json(self.folder / INDEX, index)

    def num_tokens(self, split: str) -> int:
        """Tokens of ``"train"`` or ``"heldout"``."""
        return sum(shard.num_tokens for shard in self.shards[split])

    def tokens(self, split: str) -> "MappedTokens":
        """The tokens of ``"train"`` or ``"heldout"``."""
        return MappedTokens(self.folder, split)

    def summary(self) -> str:
        """One line for a person."""
        sides = (
            f"{self.num_tokens(split):,} tokens {verb} "
            f"({self.num_documents[split]:,} documents, {self.num_bytes[split] / 1e6:.2f} MB)"
            for split, verb in ((TRAIN, "to train on"), (HELDOUT, "held out"))
        )
        return (
            f"{self.num_files:,} files: {', '.join(sides)}; left out: {self.num_duplicates} "
            f"copies, {self.num_skipped_files} unreadable files, {self.num_skipped_lines} bad lines"
        )

    def _check_shards(self) -> None:
        for shard in (shard for split in SPLITS for shard in self.shards[split]):
            path = self.folder / shard.name
            expected = shard.num_tokens * np.dtype(self.dtype).itemsize
            found = path.stat().st_size if path.is_file() else None
            if found != expected:
                raise DataError(
                    f"token file {path} should have {expected} bytes ({shard.num_tokens} "
                    f"{self.dtype} tokens) but {'is missing' if found is None else f'has {found}'}"
                    ": delete its folder, so that it is made again"
                )


class MappedTokens:
    """One split of a token folder as a single sequence, read from disk where it is sliced.

    ``tokens[a:b]`` copies those tokens and reads nothing else; shard borders do not show.

    Args:
        folder: as written by ``prepare``.
        split: ``"train"`` or ``"heldout"``.

    Raises:
        DataError: files are missing, damaged or cut short, or the split is empty.
    """

    def __init__(self, folder: str | os.PathLike[str], split: str = TRAIN):
        dataset = TokenDataset.load(folder)
        if split not in SPLITS:
            raise DataError(f"no split {split!r} in {folder}: there are {' and '.join(SPLITS)}")
        if not dataset.shards[split]:
            raise DataError(f"{folder} has no {split} tokens: prepared with heldout_fraction 0")
        self.dataset = dataset
        self.split = split
        self.vocab_size = dataset.vocab_size
        self.dtype = np.dtype(dataset.dtype).newbyteorder("<")
        self._shards = [
            np.memmap(dataset.folder / shard.name, self.dtype, "r")
            for shard in dataset.shards[split]
        ]
        self._starts = [0]
        for shard in self._shards:
            self._starts.append(self._starts[-1] + len(shard))

    def __len__(self) -> int:
        """Number of tokens."""
        return self._starts[-1]

    def __getitem__(self, window: slice) -> NDArray[Any]:
        """A copy of the tokens ``[start:stop]``, (N,) in ``dtype``; slices as lists do, step 1."""
        start, stop, step = window.indices(len(self))
        if step != 1:
            raise DataError(f"tokens are sliced with step 1, asked for {step}")
        parts = [np.empty(0, self.dtype)]
        index = bisect.bisect_right(self._starts, start) - 1
        while start < stop:
            offset = self._starts[index]
            parts.append(self._shards[index][start - offset : stop - offset])
            start = self._starts[index + 1]
            index += 1
        return np.concatenate(parts)

    def __repr__(self) -> str:
        return f"MappedTokens({str(self.dataset.folder)!r}, {self.split!r}, {len(self)} tokens)"

    def __reduce__(self) -> tuple[type["MappedTokens"], tuple[Path, str]]:
        # A pickled memmap is its whole content; another process maps the files itself.
        return MappedTokens, (self.dataset.folder, self.split)


class ShardWriter:
    """Writes one split's tokens into shards of ``shard_tokens``, the last one shorter.

    Args:
        folder: where the shards go.
        split: begins their names.
        dtype: numpy name of an unsigned integer type.
        shard_tokens: tokens per file.
    """

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int):
        self._folder = folder
        self._split = split
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._shard_tokens = shard_tokens
        self._file: BinaryIO | None = None
        self._shards: list[Shard] = []
        self._held = 0

    def write(self, ids: NDArray[np.integer[Any]]) -> None:
        """Append ``ids``, (N,)."""
        while len(ids):
            part, ids = np.split(ids, [self._shard_tokens - self._held])
            if self._file is None:
                name = f"{self._split}-{len(self._shards):05d}.bin"
                self._file = open(self._folder / name, "wb", buffering=1 << 20)  # noqa: SIM115
            self._file.write(part.astype(self._dtype).tobytes())
            self._held += len(part)
            if self._held == self._shard_tokens:
                self._finish()

    def close(self) -> tuple[Shard, ...]:
        """Flush the last shard to disk; returns all of them."""
        self._finish()
        return tuple(self._shards)

    def _finish(self) -> None:
        if self._file is None:
            return
        with self._file as file:
            file.flush()
            os.fsync(file.fileno())
        self._shards.append(Shard(os.path.basename(file.name), self._held))
        self._file, self._held = None, 0
