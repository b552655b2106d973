"""Training and held-out text: by content, stable, without copies on both sides."""

import hashlib
from pathlib import Path

import pytest

from fivefold.parallel_core.errors import DataError
from fivefold.parallel_core.training.corpus import find_files
from fivefold.parallel_core.training.split import HELDOUT, TRAIN, Corpus


def write(root: Path, texts: dict[str, str]) -> list[Path]:
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return find_files(root)


def sides(corpus: Corpus) -> dict[str, str]:
    """The side of each text that is used."""
    return {item.piece.text: item.split for item in corpus if item.split}


def many(count: int) -> dict[str, str]:
    return {f"{number}.txt": f"document {number}\n" for number in range(count)}


def test_sides_follow_the_hash_of_the_text(tmp_path: Path) -> None:
    found = sides(Corpus(write(tmp_path, many(400)), 0.25))
    assert len(found) == 400
    for text, side in found.items():
        position = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
        assert side == (HELDOUT if position < 0.25 else TRAIN)
    assert 70 < list(found.values()).count(HELDOUT) < 130


def test_a_document_keeps_its_side_when_others_come_and_move(tmp_path: Path) -> None:
    before = sides(Corpus(write(tmp_path / "one", many(200)), 0.1))
    moved = {f"sub/z{name}": text for name, text in many(300).items()}
    after = sides(Corpus(write(tmp_path / "two", moved), 0.1))
    assert len(after) == 300
    assert {text: after[text] for text in before} == before


def test_copies_are_used_once(tmp_path: Path) -> None:
    texts = many(50)
    texts |= {f"copy/{name}": text for name, text in texts.items()}
    texts |= {"twice/a.jsonl": '{"text": "document 0\\n"}\n{"text": "new"}\n{"text": "new"}\n'}
    corpus = Corpus(write(tmp_path, texts), 0.2)
    items = list(corpus)
    used = [item.piece.text for item in items if item.split]
    assert sorted(used) == sorted([*many(50).values(), "new"])
    assert corpus.num_duplicates == sum(item.split is None for item in items) == 52


def test_larger_fraction_only_adds_to_the_held_out(tmp_path: Path) -> None:
    files = write(tmp_path, many(200))
    held = [
        {text for text, side in sides(Corpus(files, fraction)).items() if side == HELDOUT}
        for fraction in (0.0, 0.1, 0.5, 0.9)
    ]
    assert held[0] == set()
    assert held[0] < held[1] < held[2] < held[3]


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 0.999999])
def test_two_documents_give_both_sides(tmp_path: Path, fraction: float) -> None:
    corpus = Corpus(write(tmp_path, many(2)), fraction)
    assert sorted(sides(corpus).values()) == [HELDOUT, TRAIN]


def test_one_book_is_split_and_one_note_is_not(tmp_path: Path) -> None:
    book = "".join(f"line {number} of the book\n" for number in range(20_000))
    found = sides(Corpus(write(tmp_path / "book", {"book.txt": book}), 0.05))
    held = sum(len(text) for text, side in found.items() if side == HELDOUT)
    assert 0.01 < held / len(book) < 0.25
    assert sum(map(len, found)) == len(book)
    files = write(tmp_path / "note", {"note.txt": "short"})
    with pytest.raises(DataError, match=r"one document .*note\.txt.* heldout_fraction to 0"):
        Corpus(files, 0.05)
    assert sides(Corpus(files, 0)) == {"short": TRAIN}


def test_unusable_files_are_counted(tmp_path: Path) -> None:
    files = write(tmp_path, many(20))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "late.txt").write_bytes(b"fine\n" * 300_000 + b"\xff")  # cut, bad at the very end
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nowhere")
    corpus = Corpus(find_files(tmp_path), 0.1)
    assert corpus.files == files
    assert corpus.skipped.files == 3
    assert "broken.txt" in corpus.skipped.reason
    assert set(sides(corpus)) == set(many(20).values())


def test_no_text_says_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no text to train on in 2 files .*: all are empty"):
        Corpus(write(tmp_path / "a", {"a.txt": "", "b.txt": " \n"}), 0.1)
    with pytest.raises(DataError, match="no text to train on in no files"):
        Corpus([], 0.1)
    files = write(tmp_path / "b", {"a.jsonl": '{"body": 1}\n{"body": 2}'})
    with pytest.raises(DataError, match=r'1 file .* 0 files and 2 lines .* has no string "text"'):
        Corpus(files, 0.1)


def test_fingerprint_is_of_the_text_not_the_place(tmp_path: Path) -> None:
    one = Corpus(write(tmp_path / "one", many(30)), 0.1).fingerprint
    assert Corpus(write(tmp_path / "two", many(30)), 0.1).fingerprint == one
    assert Corpus(write(tmp_path / "two", many(30)), 0.2).fingerprint != one
    assert Corpus(write(tmp_path / "two", many(31)), 0.1).fingerprint != one


def test_files_that_change_meanwhile_are_noticed(tmp_path: Path) -> None:
    corpus = Corpus(write(tmp_path, many(5)), 0.5)
    (tmp_path / "3.txt").write_text("another document")
    with pytest.raises(DataError, match="changed while they were read"):
        list(corpus)
