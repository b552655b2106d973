"""Preparing tokens: exact, reused, remade, at once from several processes, and killed midway."""

import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from fivefold.parallel_core.errors import ConfigError, DataError
from fivefold.parallel_core.training import corpus
from fivefold.parallel_core.training.tokenizer import ByteTokenizer
from fivefold.parallel_core.training.tokens import TokenDataset, prepare

# A process that prepares folder argv[1] into argv[2], slowly, and notes each build in argv[3].
PREPARE = """
import pathlib, sys, time
from fivefold.parallel_core.training.tokenizer import ByteTokenizer
from fivefold.parallel_core.training.tokens import prepare

class Slow(ByteTokenizer):
    count = 0
    def encode(self, text):
        if self.count == 0:
            with open(sys.argv[3], "a") as log:
                log.write("x")
        self.count += 1
        time.sleep(0.02)
        return super().encode(text)

dataset = prepare(sys.argv[1], Slow(), sys.argv[2], heldout_fraction=0.2)
print(dataset.folder, dataset.num_tokens("train"), dataset.num_tokens("heldout"))
"""


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02d}.txt").write_text(f"document {number}\n" * (number + 1))
    return folder


def start(texts: Path, cache: Path, log: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", PREPARE, str(texts), str(cache), str(log)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def documents(dataset: TokenDataset, split: str) -> list[str]:
    """The texts between end-of-text tokens; the last token must be one."""
    text = "".join("\0" if t == 256 else chr(t) for t in dataset.tokens(split)[:])
    assert text.endswith("\0")
    return text[:-1].split("\0")


@pytest.mark.parametrize("shard_tokens", [100, 1 << 20])
def test_every_document_is_there_once_in_order(
    texts: Path, tmp_path: Path, shard_tokens: int
) -> None:
    dataset = prepare(
        texts, ByteTokenizer(), tmp_path / "cache", heldout_fraction=0.2, shard_tokens=shard_tokens
    )
    train, held = documents(dataset, "train"), documents(dataset, "heldout")
    expected = [file.read_text() for file in sorted(texts.iterdir())]
    assert sorted(train + held) == sorted(expected)
    assert train == [text for text in expected if text in train]
    assert held == [text for text in expected if text in held]
    assert dataset.num_documents == {"train": len(train), "heldout": len(held)}
    assert dataset.num_bytes == {"train": sum(map(len, train)), "heldout": sum(map(len, held))}
    assert dataset.num_tokens("train") == dataset.num_bytes["train"] + len(train)
    assert (dataset.dtype, dataset.vocab_size, dataset.num_files) == ("uint16", 257, 40)


def test_pieces_of_a_long_file_read_on_within_a_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "PIECE_CHARACTERS", 64)
    book = tmp_path / "book.txt"
    # 64 characters per line, one line of them twice
    lines = [f"{number:063d}\n" for number in range(1000)]
    lines[500] = lines[499]
    book.write_text("".join(lines))
    monkeypatch.setattr(corpus, "LONGEST_OF_FEW", 64)
    monkeypatch.setattr(corpus, "_cut", lambda file: iter(file.readline, ""))
    dataset = prepare(book, ByteTokenizer(), tmp_path / "cache", heldout_fraction=0.1)
    train, held = documents(dataset, "train"), documents(dataset, "heldout")
    pieces = [line for run in train + held for line in run.splitlines(keepends=True)]
    assert sorted(pieces) == sorted(set(lines))
    for run in train + held:
        numbers = [int(line) for line in run.splitlines()]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    # runs end only where the other side, the copy or the file's end comes
    firsts = sorted(int(run.splitlines()[0]) for run in train + held)
    assert 501 in firsts
    assert 100 < len(firsts) < 300
    assert dataset.num_duplicates == 1


def test_wide_vocabularies_take_four_bytes(texts: Path, tmp_path: Path) -> None:
    class Wide(ByteTokenizer):
        vocab_size = 70_000
        fingerprint = "wide"

        def encode(self, text: str) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
            return super().encode(text) + 69_000

    dataset = prepare(texts, Wide(), tmp_path / "cache")
    assert dataset.dtype == "uint32"
    assert dataset.tokens("train")[:].max() == 69_000 + ord("u")
    Wide.vocab_size, Wide.fingerprint = 69_100, "too narrow"
    with pytest.raises(DataError, match="gave ids 69010 to 69117, but its vocab_size is 69100"):
        prepare(texts, Wide(), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_reused_until_something_changes(texts: Path, tmp_path: Path) -> None:
    def folder(**options: float) -> Path:
        return prepare(texts, tokenizer, tmp_path / "cache", **options).folder  # type: ignore[arg-type]

    tokenizer = ByteTokenizer()
    first = folder()
    stamp = (first / "index.json").stat().st_mtime_ns
    assert folder() == first
    assert (first / "index.json").stat().st_mtime_ns == stamp
    others = [folder(heldout_fraction=0.3), folder(shard_tokens=50)]
    (texts / "00.txt").write_text("changed")
    others.append(folder())
    (texts / "00.txt").write_text("CHANGED")
    os.utime(texts / "00.txt", (1e9, 1e9))
    others.append(folder())
    (texts / "new.txt").write_text("new")
    others.append(folder())
    tokenizer.fingerprint = "another"
    others.append(folder())
    assert len({first, *others}) == 7
    assert all(TokenDataset.load(path) for path in (first, *others))


def test_fingerprint_is_equal_wherever_the_text_lies(texts: Path, tmp_path: Path) -> None:
    one = prepare(texts, ByteTokenizer(), tmp_path / "one")
    moved = texts.rename(tmp_path / "moved")
    two = prepare(moved, ByteTokenizer(), tmp_path / "two", shard_tokens=64)
    assert one.folder.name != two.folder.name
    assert one.fingerprint == two.fingerprint
    np.testing.assert_array_equal(one.tokens("train")[:], two.tokens("train")[:])


def test_damaged_cache_is_made_again(texts: Path, tmp_path: Path) -> None:
    first = prepare(texts, ByteTokenizer(), tmp_path / "cache")
    expected = first.tokens("train")[:]
    for name in ("train-00000.bin", "index.json"):
        path = first.folder / name
        path.write_bytes(path.read_bytes()[:-1])
        again = prepare(texts, ByteTokenizer(), tmp_path / "cache")
        assert again == first
        np.testing.assert_array_equal(again.tokens("train")[:], expected)


def test_processes_that_start_at_once_build_once(texts: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    processes = [start(texts, tmp_path / "cache", log) for _ in range(4)]
    outputs = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    assert len(outputs) == 1
    assert log.read_text() == "x"
    folder = Path(outputs.pop().split()[0])
    assert len(documents(TokenDataset.load(folder), "train")) > 20


def test_a_killed_build_leaves_nothing_that_counts(texts: Path, tmp_path: Path) -> None:
    cache, log = tmp_path / "cache", tmp_path / "log"
    process = start(texts, cache, log)
    deadline = time.monotonic() + 30
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    left = sorted(path.suffix for path in cache.iterdir())
    assert left == [".lock", ".partial"]
    with pytest.raises(DataError):
        TokenDataset.load(next(cache.glob("*.partial")))
    dataset = prepare(texts, ByteTokenizer(), cache, heldout_fraction=0.2)
    assert len(documents(dataset, "train")) + len(documents(dataset, "heldout")) == 40
    assert sorted(path.suffix for path in cache.iterdir()) == ["", ".lock"]


def test_options_and_folders_are_checked(texts: Path, tmp_path: Path) -> None:
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="at least 0 and below 1"):
            prepare(texts, ByteTokenizer(), tmp_path, heldout_fraction=fraction)
    with pytest.raises(ConfigError, match="shard_tokens is 0: at least 1"):
        prepare(texts, ByteTokenizer(), tmp_path, shard_tokens=0)
    with pytest.raises(DataError, match=r"the token cache .* cannot be written"):
        prepare(texts, ByteTokenizer(), texts / "00.txt")
    with pytest.raises(DataError, match="does not exist"):
        prepare(texts / "nowhere", ByteTokenizer(), tmp_path)


def test_without_held_out_text(texts: Path, tmp_path: Path) -> None:
    dataset = prepare(texts, ByteTokenizer(), tmp_path / "cache", heldout_fraction=0)
    assert len(documents(dataset, "train")) == 40
    with pytest.raises(DataError, match="prepared with heldout_fraction 0"):
        dataset.tokens("heldout")


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    lines = "".join(f"a line that says {number}\n" for number in range(300_000))
    (tmp_path / "large.txt").write_text(lines)
    size = len(lines)
    del lines
    tracemalloc.start()
    try:
        dataset = prepare(tmp_path / "large.txt", ByteTokenizer(), tmp_path / "cache")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(dataset.num_bytes.values()) == size > 7e6
    assert peak < 3.5e6


def test_the_standard_library_takes_seconds(tmp_path: Path) -> None:
    begin = time.perf_counter()
    dataset = prepare("stdlib", ByteTokenizer(), tmp_path)
    assert time.perf_counter() - begin < 10
    begin = time.perf_counter()
    assert prepare("stdlib", ByteTokenizer(), tmp_path) == dataset
    assert time.perf_counter() - begin < 1
    total = dataset.num_tokens("train") + dataset.num_tokens("heldout")
    assert total > 5e6
    assert 0.01 < dataset.num_tokens("heldout") / total < 0.12
