"""Bytes and tokenizers files: ids, round trips, end of text, saved files, errors."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from fivefold.parallel_core.errors import DataError
from fivefold.parallel_core.training.tokenizer import (
    ByteTokenizer,
    FileTokenizer,
    check_vocabulary,
    load_tokenizer,
)


def random_text(rng: random.Random, length: int) -> str:
    """ASCII with control characters, the basic plane and beyond, without surrogates."""
    ranges = [range(128), range(0xD800), range(0xE000, 0x110000)]
    return "".join(chr(rng.choice(rng.choice(ranges))) for _ in range(length))


def random_texts() -> list[str]:
    rng = random.Random(0)
    return [
        "",
        "\0",
        " a .  b \r\n\t",
        "naïve 東京 🙂",
        *(random_text(rng, n) for n in range(1, 80)),
    ]


def train_file(path: Path, special: list[str], text: str = "some words, some more words\n") -> Path:
    """A small byte-level BPE tokenizer file."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text] * 10, trainer)
    tokenizer.save(str(path))
    return path


def test_byte_ids_are_the_bytes_and_come_back() -> None:
    tokenizer = ByteTokenizer()
    for text in random_texts():
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int64
        assert ids.tolist() == list(text.encode())
        assert tokenizer.decode(ids) == text
    assert (tokenizer.vocab_size, tokenizer.end_of_text_id) == (257, 256)


def test_byte_decode_survives_anything() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([104, 256, 105, 300, -1]) == "hi"
    assert tokenizer.decode([0xFF, 97]) == "\ufffda"
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode(np.array([[104], [105]])) == "hi"
    assert tokenizer.encode("a\ud800").tolist() == [97, 63]


def test_saved_bytes_are_the_same_tokenizer_in_tokenizers(tmp_path: Path) -> None:
    ours = ByteTokenizer()
    ours.save(tmp_path / "new" / "folder")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "new" / "folder" / "tokenizer.json"))
    assert theirs.get_vocab_size() == ours.vocab_size
    assert theirs.token_to_id("<|endoftext|>") == ours.end_of_text_id
    for text in random_texts():
        ids = ours.encode(text).tolist()
        assert theirs.encode(text).ids == ids
        assert theirs.decode(ids) == text
    assert theirs.encode("a<|endoftext|>b").ids == [97, 256, 98]


def test_saving_bytes_needs_no_tokenizers_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    ByteTokenizer().save(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"] == []


def test_saved_bytes_load_as_a_file_tokenizer(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.vocab_size, loaded.end_of_text_id) == (257, 256)
    for text in random_texts():
        assert loaded.encode(text).tolist() == list(text.encode())
        assert loaded.decode(loaded.encode(text)) == text
    assert loaded.decode([104, 256, 105]) == "hi"


def test_file_tokenizer_equals_the_library(tmp_path: Path) -> None:
    path = train_file(tmp_path / "some.json", ["</s>"])
    ours, theirs = FileTokenizer(path), tokenizers.Tokenizer.from_file(str(path))
    assert ours.end_of_text_id == theirs.token_to_id("</s>")
    assert ours.vocab_size == theirs.get_vocab_size()
    for text in ["some words", *random_texts()]:
        assert ours.encode(text).tolist() == theirs.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
    assert len(ours.encode("some words")) < len("some words")


def test_vocab_size_counts_gaps(tmp_path: Path) -> None:
    path = tmp_path / "gaps.json"
    model = models.WordLevel({"a": 0, "b": 7, "<eos>": 3}, unk_token="a")
    tokenizers.Tokenizer(model).save(str(path))
    assert FileTokenizer(path).vocab_size == 8


def test_length_limits_in_the_file_do_not_cut_documents(tmp_path: Path) -> None:
    path = train_file(tmp_path / "tokenizer.json", ["<eos>"])
    limited = tokenizers.Tokenizer.from_file(str(path))
    limited.enable_truncation(4)
    limited.enable_padding(length=64)
    limited.save(str(path))
    tokenizer = FileTokenizer(path)
    assert tokenizer.decode(tokenizer.encode("words " * 50)) == "words " * 50
    assert len(tokenizer.encode("w")) == 1


@pytest.mark.parametrize(
    ("special", "eos_token", "asked", "expected"),
    [
        (["<eos>", "</s>"], None, None, "</s>"),
        (["<eos>", "</s>"], None, "<eos>", "<eos>"),
        (["<x>", "</s>"], "<x>", None, "<x>"),
        (["<x>", "</s>"], {"content": "<x>"}, None, "<x>"),
        (["<x>", "</s>"], "<not there>", None, "</s>"),
        (["<x>", "</s>"], "<x>", "</s>", "</s>"),
    ],
)
def test_which_token_ends_a_text(
    tmp_path: Path, special: list[str], eos_token: object, asked: str | None, expected: str
) -> None:
    train_file(tmp_path / "tokenizer.json", special)
    if eos_token:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token}))
    tokenizer = FileTokenizer(tmp_path, asked)
    assert tokenizer.end_of_text == expected
    assert tokenizer.end_of_text_id == special.index(expected)


def test_file_tokenizer_saves_what_it_read(tmp_path: Path) -> None:
    path = train_file(tmp_path / "tokenizer.json", ["<eos>", "<x>"])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ x }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    FileTokenizer(path, "<x>").save(tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == path.read_bytes()
    saved = json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())
    assert saved == config | {"eos_token": "<x>"}
    assert FileTokenizer(tmp_path / "copy").end_of_text == "<x>"


def test_fingerprint_follows_file_and_end_of_text(tmp_path: Path) -> None:
    one = train_file(tmp_path / "one.json", ["<eos>", "</s>"])
    two = train_file(tmp_path / "two.json", ["<eos>", "</s>"], text="quite another text\n")
    copy = tmp_path / "copy.json"
    copy.write_bytes(one.read_bytes())
    prints = [
        FileTokenizer(one).fingerprint,
        FileTokenizer(one, "<eos>").fingerprint,
        FileTokenizer(two).fingerprint,
        ByteTokenizer().fingerprint,
    ]
    assert len(set(prints)) == 4
    assert FileTokenizer(copy).fingerprint == prints[0]


def test_load_tokenizer_reads_its_spec(tmp_path: Path) -> None:
    assert isinstance(load_tokenizer("bytes"), ByteTokenizer)
    path = train_file(tmp_path / "tokenizer.json", ["<eos>"])
    assert isinstance(load_tokenizer(str(path)), FileTokenizer)


def test_errors_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer at .*missing\.json: give 'bytes'"):
        load_tokenizer(tmp_path / "missing.json")
    with pytest.raises(DataError, match=r"no tokenizer at .*tokenizer\.json"):
        load_tokenizer(tmp_path)
    bad = tmp_path / "bad.json"
    for content in (b"{", b'{"model": 1}', b"\xff\xfe"):
        bad.write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.json is not a tokenizers file"):
            load_tokenizer(bad)
    none = train_file(tmp_path / "none.json", [])
    with pytest.raises(DataError, match=r"no end-of-text token: looked for <\|endoftext\|>, .*"):
        load_tokenizer(none)
    with pytest.raises(DataError, match="looked for <stop> among its"):
        load_tokenizer(none, "<stop>")


def test_missing_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r'pip install "fivefold-parallel-core\[train\]"'):
        load_tokenizer(tmp_path)


def test_check_vocabulary() -> None:
    check_vocabulary(ByteTokenizer(), 257)
    check_vocabulary(ByteTokenizer(), 320)
    with pytest.raises(DataError, match="the tokenizer has 257 ids, the model's vocabulary 256"):
        check_vocabulary(ByteTokenizer(), 256)
