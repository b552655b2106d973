"""Metric sinks: what is in their files after runs, resumes and kills."""

import builtins
import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fivefold.parallel_core.errors import DataError, ParallelError
from fivefold.parallel_core.training.metrics import JsonlSink, Sinks, TensorBoardSink, read_jsonl


def run(path: Path, first: int, last: int, loss: float = 1.0) -> None:
    """A run from step ``first`` to ``last``, each with a record."""
    sink = JsonlSink(path)
    sink.init(step=first - 1)
    for step in range(first, last + 1):
        sink.log(step, {"loss": loss})
    sink.finish()


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_jsonl(path)]


def test_one_line_a_record_readable_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.init()
    assert read_jsonl(path) == []
    for step in range(1, 4):
        sink.log(step, {"loss": 2.5 / step, "note": "x"})
        assert len(path.read_text().splitlines()) == step
        assert read_jsonl(path)[-1] == {"step": step, "loss": 2.5 / step, "note": "x"}
    sink.finish()
    sink.finish()
    assert path.read_text().startswith('{"step": 1, "loss": 2.5, "note": "x"}\n')


def test_values_become_plain_and_finite(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    sink = JsonlSink(path)
    sink.init()
    sink.log(
        1,
        {
            "tensor": torch.tensor(1.5, requires_grad=True),
            "one": torch.tensor([2]),
            "numpy": np.float32(0.5),
            "count": np.int64(3),
            "nan": math.nan,
            "inf": torch.tensor(-math.inf),
            "none": None,
            "flag": True,
        },
    )
    sink.finish()
    text = path.read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text) == {
        "step": 1,
        "tensor": 1.5,
        "one": 2,
        "numpy": 0.5,
        "count": 3,
        "nan": None,
        "inf": None,
        "none": None,
        "flag": True,
    }


@pytest.mark.parametrize("value", [torch.ones(2), [1.0], {"a": 1}, object()])
def test_other_values_are_errors_and_write_nothing(tmp_path: Path, value: Any) -> None:
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink.init()
    with pytest.raises(ParallelError, match=r"metric 'x' is .*; expected a number"):
        sink.log(1, {"x": value})
    with pytest.raises(ParallelError, match="'step' is the record's own key"):
        sink.log(1, {"step": 2})
    sink.finish()
    assert (tmp_path / "m.jsonl").read_bytes() == b""


def test_log_needs_an_open_sink(tmp_path: Path) -> None:
    for sink in (JsonlSink(tmp_path / "m.jsonl"), TensorBoardSink(tmp_path)):
        with pytest.raises(ParallelError, match=r"log\(\) before init\(\) or after finish"):
            sink.log(1, {})


def test_resume_drops_what_it_is_going_to_repeat(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    run(path, 1, 9, loss=1.0)
    run(path, 6, 7, loss=2.0)
    assert steps(path) == [1, 2, 3, 4, 5, 6, 7]
    assert [record["loss"] for record in read_jsonl(path)] == [1.0] * 5 + [2.0] * 2
    assert sorted(tmp_path.iterdir()) == [path]


def test_resume_keeps_all_records_of_the_step(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    sink = JsonlSink(path)
    sink.init()
    for step in (1, 2, 3):
        sink.log(step, {"loss": 1.0})
        sink.log(step, {"heldout_loss": 2.0})
    sink.finish()
    run(path, 3, 3)
    assert steps(path) == [1, 1, 2, 2, 3]


def test_a_new_run_starts_empty(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"rubbish of an older run\n\x00\n{")
    run(path, 1, 2)
    assert steps(path) == [1, 2]


def test_resume_without_an_older_file(tmp_path: Path) -> None:
    run(tmp_path / "m.jsonl", 5, 6)
    assert steps(tmp_path / "m.jsonl") == [5, 6]


def test_every_cut_of_the_last_line_is_repaired(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    run(path, 1, 3)
    whole = path.read_bytes()
    start = whole.index(b'{"step": 3')
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        assert steps(path) == [1, 2]
        run(path, 3, 3)
        assert path.read_bytes() == whole
    path.write_bytes(whole + b"\x00" * 12 + b"\n")
    assert steps(path) == [1, 2, 3]


@pytest.mark.parametrize("line", [b"{", b"[1]", b'{"loss": 1}', b'{"step": "1"}', b"\xff\xfe"])
def test_damage_in_the_middle_is_an_error(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"m\.jsonl, line 2: no record of metrics"):
        read_jsonl(path)
    before = path.read_bytes()
    with pytest.raises(DataError, match="line 2"):
        JsonlSink(path).init(step=3)
    assert path.read_bytes() == before


def test_reading_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read metrics .*none\.jsonl: No such file"):
        read_jsonl(tmp_path / "none.jsonl")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_a_kill_while_truncating_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    path = tmp_path / "m.jsonl"
    run(path, 1, 5)
    before = path.read_bytes()
    child = os.fork()
    if child == 0:
        owner = os if operation == "fsync" else Path
        monkeypatch.setattr(owner, operation, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        try:
            JsonlSink(path).init(step=2)
        finally:
            os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert path.read_bytes() == before
    run(path, 3, 4)
    assert steps(path) == [1, 2, 3, 4]


class Recorder:
    """A sink that notes its calls."""

    def __init__(self, fails: bool = False) -> None:
        self.calls: list[Any] = []
        self.fails = fails

    def init(self, step: int = 0, config: Any = None) -> None:
        self.calls.append(("init", step, config))

    def log(self, step: int, values: Any) -> None:
        self.calls.append(("log", step, values))

    def finish(self) -> None:
        self.calls.append("finish")
        if self.fails:
            raise OSError("disk full")


def test_sinks_pass_everything_on_and_finish_all() -> None:
    first, second = Recorder(fails=True), Recorder()
    sinks = Sinks([first, second])
    sinks.init(3, {"a": 1})
    sinks.log(4, {"loss": 1.0})
    with pytest.raises(OSError, match="disk full"):
        sinks.finish()
    assert first.calls == [("init", 3, {"a": 1}), ("log", 4, {"loss": 1.0}), "finish"]
    assert second.calls == first.calls


class Writer:
    """In place of tensorboard's SummaryWriter."""

    made: "Writer"

    def __init__(self, folder: str, purge_step: int) -> None:
        self.calls: list[Any] = [(folder, purge_step)]
        Writer.made = self

    def add_text(self, *args: Any) -> None:
        self.calls.append(args)

    def add_scalar(self, *args: Any) -> None:
        self.calls.append(args)

    def close(self) -> None:
        self.calls.append("close")


@pytest.mark.parametrize(("step", "purge"), [(0, 0), (7, 8)])
def test_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, purge: int
) -> None:
    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    sink = TensorBoardSink(tmp_path)
    sink.init(step, {"a": 1})
    sink.log(step + 1, {"loss": torch.tensor(2.0), "bad": math.nan, "note": "text"})
    sink.finish()
    sink.finish()
    assert Writer.made.calls == [
        (str(tmp_path), purge),
        ("config", '```\n{\n  "a": 1\n}\n```', step),
        ("loss", 2.0, step + 1),
        "close",
    ]


def test_tensorboard_missing_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith(("tensorboard", "torch.utils.tensorboard")):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "fivefold-parallel-core\[tensorboard\]"'):
        TensorBoardSink(tmp_path).init()
