"""Tokenizers: text to ids and back, as bytes or through a Hugging Face ``tokenizers`` file."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fivefold.parallel_core.errors import DataError
from fivefold.parallel_core.files import atomic_write_bytes, write_json

Ids = NDArray[np.int64]

BYTES = "bytes"
END_OF_TEXT = "<|endoftext|>"
# Names that published tokenizers give the token that ends a document, most specific first.
END_OF_TEXT_NAMES = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<|im_end|>",
)


class Tokenizer(Protocol):
    """What data preparation, training and export ask of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def end_of_text_id(self) -> int:
        """The id written after every document."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes whenever any text could get other ids."""
        ...

    def encode(self, text: str) -> Ids:
        """The ids of ``text``, (N,) int64, with no special tokens added."""
        ...

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """The text of ``ids`` without special tokens."""
        ...

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the files from which transformers' ``AutoTokenizer`` loads the same tokenizer."""
        ...


class ByteTokenizer:
    """Ids 0..255 are the bytes of UTF-8 and 256 ends a document; nothing to download or train.

    >>> ByteTokenizer().encode("hé").tolist()
    [104, 195, 169]
    """

    vocab_size = 257
    end_of_text_id = 256
    fingerprint = "bytes-1"

    def encode(self, text: str) -> Ids:
        """The bytes of ``text``, (N,) int64; lone surrogates, which have none, become ``?``."""
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int64)

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """The text of ``ids``; invalid UTF-8 becomes U+FFFD and ids that are no byte vanish."""
        array = np.asarray(ids, np.int64).reshape(-1)
        array = array[(array >= 0) & (array < 256)]
        return array.astype(np.uint8).tobytes().decode("utf-8", "replace")

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``; needs no other library.

        The files give the same ids for every text, save that they read a literal
        ``<|endoftext|>`` inside a text as id 256, as Hugging Face tokenizers do.
        """
        content = json.dumps(_byte_tokenizer_json(), ensure_ascii=False).encode()
        _save(directory, content, _transformers_config(END_OF_TEXT))


class FileTokenizer:
    """A ``tokenizer.json`` of the Hugging Face ``tokenizers`` library.

    Args:
        path: the file, or a folder that holds ``tokenizer.json``.
        end_of_text: name of the token that ends a document. None takes the ``eos_token`` of a
            ``tokenizer_config.json`` beside the file, else the first of ``END_OF_TEXT_NAMES``
            that the vocabulary has.

    Raises:
        DataError: the file is missing or damaged, or no end-of-text token was found.
        ImportError: the ``tokenizers`` library is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], end_of_text: str | None = None):
        self.path = _tokenizer_file(Path(path).expanduser())
        self._json = self.path.read_bytes()
        self._config = _read_config(self.path.with_name("tokenizer_config.json"))
        self._tokenizer = _load(self.path, self._json)
        # Files saved after fine-tuning may carry a length limit that would cut documents silently.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.end_of_text = _end_of_text(self.path, vocabulary, end_of_text, self._config)
        self.end_of_text_id = vocabulary[self.end_of_text]
        # Not the number of entries: ids may have gaps, and tables are indexed by id.
        self.vocab_size = max(vocabulary.values()) + 1
        self.fingerprint = hashlib.sha256(
            self._json + b"\0" + self.end_of_text.encode()
        ).hexdigest()

    def encode(self, text: str) -> Ids:
        """The ids of ``text``, (N,) int64, with no special tokens added."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """The text of ``ids`` without special tokens."""
        text: str = self._tokenizer.decode(np.asarray(ids, np.int64).reshape(-1).tolist())
        return text

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write ``tokenizer.json`` as it was read, and ``tokenizer_config.json``."""
        config = self._config or _transformers_config(self.end_of_text)
        _save(directory, self._json, config | {"eos_token": self.end_of_text})


def load_tokenizer(spec: str | os.PathLike[str], end_of_text: str | None = None) -> Tokenizer:
    """The tokenizer that ``spec`` names: ``"bytes"``, or the path of a ``tokenizer.json``.

    Raises:
        DataError: no such file, or one that does not work as a tokenizer.
    """
    if str(spec) == BYTES:
        return ByteTokenizer()
    return FileTokenizer(spec, end_of_text)


class HasVocabulary(Protocol):
    """Anything whose ids lie below a ``vocab_size``: a tokenizer, or prepared tokens."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...


def check_vocabulary(tokenizer: HasVocabulary, vocab_size: int) -> None:
    """Check that a model with ``vocab_size`` rows has one for every id of ``tokenizer``.

    Raises:
        DataError: some ids have no row.
    """
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model's vocabulary {vocab_size}: "
            f"set the model's vocab_size to {tokenizer.vocab_size} or more, or use a tokenizer "
            f"of at most {vocab_size} ids"
        )


def _tokenizer_file(path: Path) -> Path:
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(
            f"no tokenizer at {file}: give {BYTES!r}, a tokenizer.json of the Hugging Face "
            "tokenizers library, or a folder that holds one"
        )
    return file


def _load(path: Path, content: bytes) -> Any:
    try:
        from tokenizers import Tokenizer as HuggingFaceTokenizer
    except ImportError as error:
        raise ImportError(
            f"reading {path} needs the tokenizers library: "
            'pip install "fivefold-parallel-core[train]"'
        ) from error
    try:
        return HuggingFaceTokenizer.from_str(content.decode())
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{path} is not a tokenizers file: {error}") from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    return config if isinstance(config, dict) else {}


def _end_of_text(
    path: Path, vocabulary: dict[str, int], name: str | None, config: dict[str, Any]
) -> str:
    if name is not None:
        names: Sequence[str] = (name,)
    else:
        eos = config.get("eos_token")
        eos = eos.get("content") if isinstance(eos, dict) else eos
        names = ([eos] if isinstance(eos, str) else []) + list(END_OF_TEXT_NAMES)
    for candidate in names:
        if candidate in vocabulary:
            return candidate
    raise DataError(
        f"{path} has no end-of-text token: looked for {', '.join(names)} among its "
        f"{len(vocabulary)} tokens; name the token that ends a document (end_of_text)"
    )


def _byte_level_characters() -> list[str]:
    """The printable character by which byte-level BPE files write each byte, by byte value.

    Printable bytes of Latin-1 stand for themselves; the others take the characters from U+0100
    on in turn. The table is the convention of the byte-level BPE format (GPT-2's files).
    """
    itself = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in itself else next(others)) for byte in range(256)]


def _byte_tokenizer_json() -> dict[str, Any]:
    # No merges: every byte stays its own token. use_regex would only cut words, which changes
    # nothing without merges.
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    vocabulary = {char: byte for byte, char in enumerate(_byte_level_characters())}
    end = {"id": 256, "content": END_OF_TEXT, "special": True, "normalized": False}
    end |= {"single_word": False, "lstrip": False, "rstrip": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary | {END_OF_TEXT: 256},
            "merges": [],
        },
    }


def _transformers_config(end_of_text: str) -> dict[str, Any]:
    # Without clean_up_tokenization_spaces=False decoding would change text such as " ." to ".".
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end_of_text,
        "clean_up_tokenization_spaces": False,
    }


def _save(directory: str | os.PathLike[str], content: bytes, config: dict[str, Any]) -> None:
    folder = Path(directory)
    atomic_write_bytes(folder / "tokenizer.json", content)
    write_json(folder / "tokenizer_config.json", config)
