"""Preparing tokens: text is tokenised once, into a cache folder that later runs map and reuse."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fivefold.parallel_core.errors import ConfigError, DataError
from fivefold.parallel_core.files import sync_folder
from fivefold.parallel_core.training.corpus import Source, find_files
from fivefold.parallel_core.training.shards import FORMAT, MappedTokens, ShardWriter, TokenDataset
from fivefold.parallel_core.training.split import SPLITS, Corpus
from fivefold.parallel_core.training.tokenizer import Tokenizer

__all__ = ["MappedTokens", "TokenDataset", "prepare"]


def prepare(
    source: Source,
    tokenizer: Tokenizer,
    cache_dir: str | os.PathLike[str],
    *,
    heldout_fraction: float = 0.05,
    shard_tokens: int = 1 << 26,
) -> TokenDataset:
    """Tokenise the text of ``source`` into a folder under ``cache_dir``, or find it done.

    The folder is named after the files' paths, sizes and times, the tokenizer and the options:
    any change makes another folder, and earlier ones stay until someone deletes them. It appears
    under its name only when complete. Several processes may call this at once: one works, the
    others wait for it.

    Args:
        source: see ``corpus.find_files``.
        tokenizer: a document becomes its ids and then ``end_of_text_id``.
        cache_dir: a writable folder, made if missing; on each machine or on a shared disk.
        heldout_fraction: expected share of the documents never to train on, in [0, 1).
        shard_tokens: tokens per file.

    Raises:
        DataError: no text, or a tokenizer that gives ids beyond its ``vocab_size``.
        ConfigError: an option out of range.
    """
    _check(heldout_fraction, shard_tokens)
    files = find_files(source)
    key = _cache_key(files, tokenizer, [heldout_fraction, shard_tokens])
    folder = Path(cache_dir).absolute() / key
    if found := _complete(folder):
        return found
    with _locked(folder.with_suffix(".lock")):
        if found := _complete(folder):
            return found
        return _build(folder, Corpus(files, heldout_fraction), tokenizer, shard_tokens)


def _check(heldout_fraction: float, shard_tokens: int) -> None:
    if not 0 <= heldout_fraction < 1:
        raise ConfigError(f"heldout_fraction is {heldout_fraction}: at least 0 and below 1")
    if shard_tokens < 1:
        raise ConfigError(f"shard_tokens is {shard_tokens}: at least 1")


def _cache_key(files: Sequence[Path], tokenizer: Tokenizer, options: list[float]) -> str:
    """Changes whenever ``prepare`` could give other files; costs one stat per text file."""
    state = [FORMAT, tokenizer.fingerprint, options, [_stamp(file) for file in files]]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:32]


def _stamp(file: Path) -> list[str | int]:
    try:
        stat = file.stat()
    except OSError:
        return [os.fspath(file)]
    return [os.fspath(file), stat.st_size, stat.st_mtime_ns]


def _complete(folder: Path) -> TokenDataset | None:
    try:
        return TokenDataset.load(folder)
    except DataError:
        return None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the system frees the lock of a process that dies."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "wb")  # noqa: SIM115
    except OSError as error:
        raise DataError(f"the token cache {path.parent} cannot be written: {error}") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(folder: Path, corpus: Corpus, tokenizer: Tokenizer, shard_tokens: int) -> TokenDataset:
    """Write under another name, then rename: what bears the name ``folder`` is whole."""
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a build that was killed
    partial.mkdir()
    try:
        _write(partial, corpus, tokenizer, shard_tokens).save()
        shutil.rmtree(folder, ignore_errors=True)  # one that is damaged
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sync_folder(folder.parent)
    return TokenDataset.load(folder)


def _write(folder: Path, corpus: Corpus, tokenizer: Tokenizer, shard_tokens: int) -> TokenDataset:
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    end = np.array([tokenizer.end_of_text_id])
    writers = {split: ShardWriter(folder, split, dtype, shard_tokens) for split in SPLITS}
    num_documents = dict.fromkeys(SPLITS, 0)
    num_bytes = dict.fromkeys(SPLITS, 0)
    # Pieces of one file that land on the same side read on without an end-of-text between them.
    unfinished: str | None = None
    for item in corpus:
        if unfinished and (item.piece.opens or item.split != unfinished):
            writers[unfinished].write(end)
        unfinished = item.split
        if item.split:
            writers[item.split].write(_encode(tokenizer, item.piece.text))
            num_documents[item.split] += 1
            num_bytes[item.split] += item.num_bytes
    if unfinished:
        writers[unfinished].write(end)
    return TokenDataset(
        folder=folder,
        fingerprint=_fingerprint(corpus, tokenizer),
        dtype=dtype,
        vocab_size=tokenizer.vocab_size,
        end_of_text_id=tokenizer.end_of_text_id,
        shards={split: writer.close() for split, writer in writers.items()},
        num_documents=num_documents,
        num_bytes=num_bytes,
        num_files=len(corpus.files),
        num_duplicates=corpus.num_duplicates,
        num_skipped_files=corpus.skipped.files,
        num_skipped_lines=corpus.skipped.lines,
    )


def _encode(tokenizer: Tokenizer, text: str) -> NDArray[np.int64]:
    ids = tokenizer.encode(text)
    if len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
        raise DataError(
            f"the tokenizer gave ids {ids.min()} to {ids.max()}, but its vocab_size is "
            f"{tokenizer.vocab_size}"
        )
    return ids


def _fingerprint(corpus: Corpus, tokenizer: Tokenizer) -> str:
    return hashlib.sha256(f"{corpus.fingerprint} {tokenizer.fingerprint}".encode()).hexdigest()
