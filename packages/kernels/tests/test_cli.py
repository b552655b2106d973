"""The command line: what it prints, how it ends, and what it does not import."""

import re
import subprocess
import sys
from typing import Any

import pytest

from fivefold.kernels import BackendError, cli, commands, samples
from fivefold.kernels.cli import main


def test_help_and_version_import_no_torch() -> None:
    code = (
        "import sys\n"
        "from fivefold.kernels.cli import main\n"
        "for line in ('--help', '--version', 'which -h', 'report -h', 'bench -h'):\n"
        "    try:\n"
        "        main(line.split())\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 0\n"
        "heavy = {'torch', 'triton', 'cuda', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "usage: fivefold-kernels" in finished.stdout


def test_which_names_backends_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["which", "rms_norm"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("kernels/rms_norm, called with ")
    cpu = lines.index("  tensors on cpu")
    cuda = next(i for i, line in enumerate(lines) if line.startswith("  tensors on cuda"))
    for part, backend in ((lines[cpu:cuda], "(cpu|reference)"), (lines[cuda:], "triton")):
        text = "\n".join(part)
        for op in ("rms_norm_forward", "rms_norm_backward"):
            assert re.search(f"    {op}: {backend}", text), text
    # conftest.py turned the interpreter on.
    assert any("not triton: Triton's interpreter runs only where" in line for line in lines[:cuda])
    assert any("not reference: it can, and triton comes first" in line for line in lines[cuda:])


def test_which_takes_all_ops_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["which"]) == 0
    out = capsys.readouterr().out
    for op in ("rms_norm", "layer_norm", "cross_entropy", "swiglu", "rotary", "attention"):
        assert f"kernels/{op}, called with" in out


def test_an_op_that_cannot_be_imported_hides_no_other(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str, package: str) -> Any:
        if name == "relu2":
            raise ImportError("half an op")
        return samples.load(name, package)

    monkeypatch.setattr(commands, "load", load)
    assert main(["which", "relu2", "rms_norm"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "kernels/relu2: ImportError: half an op"
    assert lines[1].startswith("kernels/rms_norm, called with ")
    with pytest.raises(ImportError):
        main(["which", "relu2", "--debug"])


def test_which_obeys_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIVEFOLD_BACKEND", "aten")
    assert main(["which", "rms_norm"]) == 0
    out = capsys.readouterr().out
    assert "was asked by FIVEFOLD_BACKEND to run on 'aten': this op has triton, cpu" in out
    assert "rms_norm_forward: nothing: " in out
    assert "not reference: it can, and FIVEFOLD_BACKEND asks for aten" in out


@pytest.mark.parametrize("command", ["which", "report"])
def test_an_op_that_is_not_there(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "moe/rms_norm"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fivefold-kernels: error: there is no op moe/rms_norm; there are ")
    assert error.count("\n") == 1


def test_report_says_that_the_interpreter_is_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "rms_norm"]) == 1
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err
    with pytest.raises(BackendError):
        main(["report", "rms_norm", "--debug"])


def test_report_refuses_a_table_that_is_none(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "--check", str(tmp_path / "nowhere.json")]) == 1
    assert "nowhere.json" in capsys.readouterr().err
    (tmp_path / "a.json").write_text("{}}")
    assert main(["report", "--check", str(tmp_path / "a.json")]) == 2
    assert "a.json is no table of kernels" in capsys.readouterr().err


def test_a_wrong_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    for line in ([], ["dance"], ["report", "--jobs", "0"], ["report", "--target", "sm_13"]):
        with pytest.raises(SystemExit) as end:
            main(line)
        assert end.value.code == 2
    assert "invalid choice: 'sm_13'" in capsys.readouterr().err


def test_an_interrupt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_command", lambda _: interrupted)
    assert main(["which"]) == 130
    assert capsys.readouterr().err == "fivefold-kernels: interrupted\n"
