"""Resolving names and pushing folders, with the network's side replaced."""

import builtins
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from fivefold.parallel_core.errors import CheckpointError
from fivefold.parallel_core.hub import push, resolve


def test_folders_come_back_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve("~/owner/name") == tmp_path / "owner" / "name"
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name") == Path("owner/name")


def test_names_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def download(repo_id: str, **options: Any) -> str:
        calls.append((repo_id, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("owner/na.me-1_x", revision="v2", allow_patterns=["*.json"]) == tmp_path
    assert resolve("gpt2") == tmp_path
    assert calls[0] == ("owner/na.me-1_x", {"revision": "v2", "allow_patterns": ["*.json"]})
    patterns = calls[1][1]["allow_patterns"]
    assert "model*.safetensors" in patterns
    assert not any("bin" in pattern for pattern in patterns)


@pytest.mark.parametrize(
    "name",
    [
        "a/b/c",
        "./run",
        "../run",
        "/no/such/folder",
        "a b",
        "-a/b",
        "a/b-",
        "a--b",
        "a..b",
        "",
        "x" * 97,
    ],
)
def test_neither_folder_nor_repository(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # nothing lies beside it
    with pytest.raises(CheckpointError, match="expected a folder or a repository") as info:
        resolve(name)
    assert "\n" not in str(info.value)
    assert repr(name) in str(info.value)


def test_a_path_is_never_a_repository(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="as a folder it does not exist"):
        resolve(Path("owner/name"))
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="as a folder it is a file"):
        resolve(str(file))


def test_download_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(repo_id: str, **options: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nand more\nlines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        CheckpointError, match=r"^'runs/step10': no such folder here.*no connection$"
    ):
        resolve("runs/step10")
    with pytest.raises(CheckpointError, match="the repository at 'v9' cannot be had"):
        resolve("runs/step10", revision="v9")


def test_push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Api:
        def __init__(self, token: str | None) -> None:
            calls.append(token)

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            calls.append((repo_id, options))
            return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{repo_id}")

        def upload_folder(self, **options: Any) -> None:
            calls.append(options)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    address = push(tmp_path, "name", private=True, commit_message="first", token="secret")
    assert address == "https://huggingface.co/me/name"
    assert calls[0] == "secret"
    assert calls[1] == ("name", {"private": True, "exist_ok": True})
    assert calls[2]["repo_id"] == "me/name"
    assert calls[2]["folder_path"] == str(tmp_path)
    assert calls[2]["commit_message"] == "first"
    assert calls[2]["ignore_patterns"] == ["*.partial-*"]


def test_push_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot push .*nowhere: no such folder"):
        push(tmp_path / "nowhere", "me/name")


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "huggingface_hub":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "huggingface_hub")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "fivefold-parallel-core\[hub\]"'):
        resolve("owner/name")
