"""The verb from its arguments to its file."""

import argparse
import json
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

from fivefold.kernels.bench import session
from fivefold.kernels.bench.command import add_arguments, run
from fivefold.kernels.samples import Peer

from .parts import double, samples


def bench(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([*arguments, "--repeats", "2", "--no-compile"]))


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch):
    """Lets a test say which op is the only one that is installed."""

    def install(made, *more: str) -> None:
        def load(name, package):
            if name in more:
                raise ImportError("its file is broken")
            return made

        names = [("kernels", "double"), *(("kernels", name) for name in more)]
        monkeypatch.setattr(session, "select", lambda asked: names)
        monkeypatch.setattr(session, "load", load)

    return install


def absent(x):
    from nothing_of_this_name import double as other

    return other(x)


def test_table_and_file(op, tmp_path, capsys) -> None:
    op(samples(Peer(name="liger", function=absent)))
    path = tmp_path / "results.json"
    assert bench("double", "--device", "cpu", "--json", str(path)) == 0
    out = capsys.readouterr().out
    assert "cpu: " in out
    assert "say nothing of a GPU" in out
    assert "kernels/double  4x3  float32  forward+backward  floor" in out
    assert out.count("liger                 not installed: nothing_of_this_name") == 2

    content = json.loads(path.read_text())
    assert set(content) == {
        *("schema", "started", "complete", "machine", "versions", "limits", "roofline"),
        *("broken", "cases"),
    }
    assert (content["schema"], content["complete"]) == (1, True)
    assert content["machine"].keys() >= {"device", "device_name", "cpu", "cores", "threads"}
    assert content["versions"].keys() >= {"python", "torch", "fivefold-kernels"}
    forward, both = content["cases"]
    assert (forward["phase"], both["phase"]) == ("forward", "forward+backward")
    assert (forward["bytes"], forward["flops"]) == (1000, 0)
    assert (both["bytes"], both["flops"]) == (3000, 600)
    copy = content["roofline"]["copy_bytes_per_second"]
    assert forward["floor_seconds"] == pytest.approx(1000 / copy)
    for result in forward["results"][:2]:
        assert set(result) == {"name", "status", "reason", "seconds", "summary"}
        assert len(result["seconds"]["cpu"]) == len(result["seconds"]["wall"]) == 2
        assert set(result["summary"]["cpu"]) == {
            *("median", "minimum", "ratio", "ratio_of_minima", "percent_of_floor"),
        }
    assert forward["results"][0]["summary"]["wall"]["ratio"] == 1


def test_only(op, capsys) -> None:
    op(samples())
    assert bench("--only", "backward", "--device", "cpu") == 0
    out = capsys.readouterr().out
    assert "forward+backward" in out
    assert "float32  forward  " not in out


def test_cpu_where_there_is_no_gpu(op, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    op(samples())
    assert bench("--only", "forward") == 0
    assert capsys.readouterr().out.startswith("cpu: ")


def test_file_is_written_after_each_case_with_the_versions_of_peers(op, tmp_path) -> None:
    path = tmp_path / "results.json"
    seen = []

    def peer(x):
        import _pytest

        if torch.is_grad_enabled():
            seen.append(json.loads(path.read_text()))
        return x * 2 if _pytest else None

    op(samples(Peer(name="peer", function=peer)))
    assert bench("--device", "cpu", "--json", str(path)) == 0
    assert [case["phase"] for case in seen[0]["cases"]] == ["forward"]
    assert not seen[0]["complete"]
    assert seen[0]["versions"]["pytest"] == version("pytest")


def test_several_dtypes(op, capsys) -> None:
    op(samples())
    assert bench("--dtype", "float64,bfloat16", "--only", "forward", "--device", "cpu") == 0
    out = capsys.readouterr().out
    assert out.index("double  4x3  float64") < out.index("double  4x3  bfloat16")


def test_wrong_contender_is_said_again_at_the_end(op, capsys) -> None:
    op(samples(eager=lambda x: x * 3))
    assert bench("--only", "forward", "--device", "cpu") == 0
    last = capsys.readouterr().out.splitlines()[-2]
    assert last.startswith("not timed: kernels/double 4x3 float32 forward: eager, WRONG: ")


def test_ours_fails(op) -> None:
    def breaks(x, backend=None):
        raise RuntimeError("broke")

    op(samples(function=breaks))
    assert bench("--device", "cpu") == 1


def test_op_that_cannot_be_imported_does_not_stop_the_rest(op, tmp_path, capsys) -> None:
    op(samples(), "bad")
    path = tmp_path / "results.json"
    assert bench("--device", "cpu", "--json", str(path)) == 1
    assert "kernels/bad: ImportError: its file is broken" in capsys.readouterr().out
    content = json.loads(path.read_text())
    assert content["broken"] == ["kernels/bad: ImportError: its file is broken"]
    assert len(content["cases"]) == 2


def test_ctrl_c_keeps_what_is_measured(op, tmp_path, capsys) -> None:
    def interrupted(x):
        if torch.is_grad_enabled():
            raise KeyboardInterrupt
        return double(x)

    op(samples(eager=interrupted))
    path = tmp_path / "results.json"
    assert bench("--device", "cpu", "--json", str(path)) == 130
    assert "interrupted after 1 case" in capsys.readouterr().out
    content = json.loads(path.read_text())
    assert (len(content["cases"]), content["complete"]) == (1, False)


def test_threads_are_set_and_put_back(op, capsys) -> None:
    seen = []
    op(samples(eager=lambda x: seen.append(torch.get_num_threads()) or x * 2))
    assert bench("--threads", "2", "--only", "forward", "--device", "cpu") == 0
    assert set(seen) == {2}
    assert torch.get_num_threads() == 1
    assert "2 threads" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "there is no op kernels/nope; there are "),
        (["--dtype", "float7"], "there is no dtype 'float7'; there are float64, float32, "),
        (["--device", "tpu"], "there is no device 'tpu'; there are cpu, cuda"),
        (["--json", "/nothing/here.json"], "cannot write /nothing/here.json: "),
    ],
)
def test_unknown_names_are_one_clear_line(arguments, message: str, capsys) -> None:
    assert bench(*arguments) == 2
    found = capsys.readouterr()
    assert found.err.startswith(f"fivefold-kernels bench: error: {message}")
    assert found.err.count("\n") == 1
    assert found.out == ""


def test_no_sample_has_the_dtype(op, capsys) -> None:
    op(samples())
    assert bench("double", "--dtype", "float16", "--device", "cpu") == 2
    assert "no sample of double is made for float16; " in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_at_hand(capsys) -> None:
    assert bench("--device", "cuda") == 2
    assert "finds no CUDA device here; there is cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--threads", "0"], ["--repeats", "x"], ["--seconds", "nan"], ["--seconds", "x"]],
)
def test_numbers(arguments: list[str], capsys) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(arguments)
    assert "needs a " in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    code = (
        "import argparse, sys\n"
        "from fivefold.kernels.bench.command import add_arguments, run\n"
        "parser = argparse.ArgumentParser()\n"
        "add_arguments(parser)\n"
        "parser.format_help()\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
