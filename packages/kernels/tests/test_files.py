"""Files that a command writes: refused before the work, whole after it."""

from pathlib import Path

import pytest

from fivefold.kernels import KernelInputError, files
from fivefold.kernels.cli import main


def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    files.replace(path, "first")
    files.replace(path, "second")
    assert path.read_text() == "second" and path.stat().st_mode & 0o777 == 0o644

    def killed(*_: object) -> None:
        raise OSError("disk")

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(OSError, match="disk"):
        files.replace(path, "third")
    assert path.read_text() == "second"
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    files.check_writable(None)
    files.check_writable(tmp_path / "a.json")
    for path in (tmp_path, tmp_path / "nowhere" / "a.json"):
        with pytest.raises(KernelInputError, match="cannot write"):
            files.check_writable(path)


@pytest.mark.parametrize("command", ["report", "bench"])
def test_commands_refuse_it_before_the_work(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "rms_norm", "--json", str(tmp_path / "nowhere" / "a.json")]) == 2
    assert "cannot write" in capsys.readouterr().err
