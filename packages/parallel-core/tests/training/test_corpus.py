"""Which files a source names, and the pieces of text in them."""

import json
from pathlib import Path

import pytest

from fivefold.parallel_core.errors import DataError
from fivefold.parallel_core.training import corpus
from fivefold.parallel_core.training.corpus import (
    Piece,
    Skipped,
    find_files,
    longest_document,
    python_source_files,
    read_pieces,
)


def write(root: Path, **texts: str) -> None:
    """Files under ``root``; ``__`` in a key is a folder border, ``_`` the suffix's dot."""
    for key, text in texts.items():
        path = root / key.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def names(root: Path, source: object) -> list[str]:
    return [file.relative_to(root).as_posix() for file in find_files(source)]  # type: ignore[arg-type]


def test_standard_library_is_there_sorted_and_without_tests() -> None:
    files = python_source_files()
    assert find_files("stdlib") == files
    assert files == sorted(set(files), key=str)
    found = {file.name for file in files}
    assert {"argparse.py", "typing.py", "events.py"} <= found
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    root = Path(json.__file__).parent.parent
    assert not any(left_out & set(file.relative_to(root).parts) for file in files)
    assert not any(name.startswith("_sysconfigdata") for name in found)
    assert 5e6 < sum(file.stat().st_size for file in files) < 40e6


def test_python_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match=r"holds no \.py files: give a folder"):
        python_source_files()


def test_folder_takes_text_and_leaves_hidden_out(tmp_path: Path) -> None:
    write(tmp_path, b_txt="x", a_md="x", sub__deep__c_py="x", d_csv="x", e_jsonl="{}")
    write(tmp_path / ".git", f_txt="x")
    write(tmp_path / "__pycache__", g_py="x")
    write(tmp_path, _hidden_txt="x")
    expected = ["a.md", "b.txt", "e.jsonl", "sub/deep/c.py"]
    assert names(tmp_path, tmp_path) == names(tmp_path, str(tmp_path) + "/") == expected


def test_glob_single_file_and_sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, b_csv="x", a_csv="x", sub__c_csv="x", d_txt="x")
    assert names(tmp_path, f"{tmp_path}/*.csv") == ["a.csv", "b.csv"]
    assert names(tmp_path, f"{tmp_path}/**/*.csv") == ["a.csv", "b.csv", "sub/c.csv"]
    assert names(tmp_path, tmp_path / "b.csv") == ["b.csv"]
    assert names(tmp_path, [tmp_path / "d.txt", tmp_path / "a.csv"]) == ["d.txt", "a.csv"]
    monkeypatch.chdir(tmp_path)
    assert names(tmp_path, "sub/*") == ["sub/c.csv"]
    assert names(tmp_path, "d.txt") == ["d.txt"]


def test_a_path_with_glob_characters_is_itself(tmp_path: Path) -> None:
    write(tmp_path / "data[1]", a_txt="x")
    assert names(tmp_path, tmp_path / "data[1]") == ["data[1]/a.txt"]


def test_errors_say_what_was_asked_and_found(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data '.*nowhere' does not exist: give a folder or glob"):
        find_files(tmp_path / "nowhere")
    with pytest.raises(DataError, match="data '' does not exist"):
        find_files("")
    with pytest.raises(DataError, match=r"no file matches '.*\*\.txt'"):
        find_files(f"{tmp_path}/*.txt")
    with pytest.raises(DataError, match=r"holds no text files: .* found no files at all"):
        find_files(tmp_path)
    write(tmp_path, a_csv="x", b_csv="x", c="x")
    with pytest.raises(DataError, match=r"found 3 other files \(2 \.csv, 1 no suffix\)"):
        find_files(tmp_path)
    with pytest.raises(DataError, match=r"data file .*gone\.txt does not exist"):
        find_files([tmp_path / "gone.txt"])


def test_a_short_file_is_one_document_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo\rnaïve\n".encode())
    skipped = Skipped()
    assert list(read_pieces(path, 1000, skipped)) == [Piece("one\r\ntwo\rnaïve\n", True)]
    path.write_text(" \n\t")
    assert list(read_pieces(path, 1000, skipped)) == []
    assert skipped == Skipped()


def test_a_long_file_is_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "PIECE_CHARACTERS", 10)
    path = tmp_path / "a.txt"
    text = "".join(f"line {number} é\n" for number in range(20)) + "x" * 45
    path.write_text(text)
    pieces = list(read_pieces(path, 30, Skipped()))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.opens for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert all(len(piece.text) <= 20 for piece in pieces)
    assert all(piece.text.endswith("\n") for piece in pieces[:10])
    assert list(read_pieces(path, 1000, Skipped())) == [Piece(text, True)]


def test_jsonl_is_one_document_per_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = ['{"text": "one\\ntwo"}', "", '{"text": "  "}', '{"text": "three", "id": 1}']
    bad = ["{", '{"body": "x"}', '{"text": 3}', "[1]", "3", '{"text": "\\ud800"}', "null"]
    path.write_text("\n".join(rows + bad))
    skipped = Skipped()
    texts = list(read_pieces(path, 4, skipped))
    assert texts == [Piece("one\ntwo", True), Piece("three", True)]
    assert skipped == Skipped(lines=len(bad), reason=f'{path} line 5 has no string "text"')


def test_undecodable_file_raises(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(UnicodeDecodeError):
        list(read_pieces(path, 100, Skipped()))


def test_few_files_are_cut_sooner() -> None:
    assert longest_document(1) == longest_document(15) == 32768
    assert longest_document(16) == longest_document(10**6) == 1048576
