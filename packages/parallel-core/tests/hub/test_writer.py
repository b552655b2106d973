"""Writing folders: other readers' view of them, kills at every step, and the plan's errors."""

import json
import os
import signal
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fivefold.parallel_core.errors import CheckpointError, ConfigError
from fivefold.parallel_core.hub import SafetensorsReader, write_sharded
from fivefold.parallel_core.hub.reader import INDEX, SINGLE
from fivefold.parallel_core.hub.writer import Spec

Tensors = dict[str, torch.Tensor]


def make(count: int, fill: float, rows: int = 4) -> Tensors:
    """``count`` tensors of 64 bytes."""
    return {f"layer.{i}.w": torch.full((rows, 4), fill + i) for i in range(count)}


def plan(tensors: Tensors) -> list[Spec]:
    return [(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]


def save(folder: Path, tensors: Tensors, size: int | str = "5GB") -> list[Path]:
    return write_sharded(folder, plan(tensors), tensors.items(), size)


def load(folder: Path) -> Tensors:
    with SafetensorsReader(folder) as reader:
        return {name: reader.read(name) for name in reader.names()}


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def mixed() -> Tensors:
    return {
        "flag": torch.tensor([True, False, True]),
        "half": torch.arange(7).to(torch.bfloat16),
        "transposed": torch.arange(6.0).reshape(2, 3).t(),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(3, 0),
        "fp8": torch.arange(5.0).to(torch.float8_e4m3fn),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }


def test_single_file_is_read_by_the_library(tmp_path: Path) -> None:
    paths = save(tmp_path / "new" / "folder", mixed())
    assert paths == [tmp_path / "new" / "folder" / "model.safetensors"]
    assert names(paths[0].parent) == ["model.safetensors"]
    for loaded in (load_file(paths[0]), load(paths[0].parent)):
        assert loaded.keys() == mixed().keys()
        for name, tensor in mixed().items():
            assert loaded[name].dtype == tensor.dtype
            assert loaded[name].shape == tensor.shape
            assert torch.equal(loaded[name].to(torch.float64), tensor.to(torch.float64))
    with safe_open(paths[0], "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_shards_and_index(tmp_path: Path) -> None:
    tensors = make(4, 0.0) | {"big": torch.ones(20, 4), "last": torch.ones(1)}
    paths = save(tmp_path, tensors, 130)
    expected = [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    assert [path.name for path in paths] == expected
    assert names(tmp_path) == [*expected, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in tensors.values())}
    assert index["weight_map"] == dict(
        zip(tensors, [expected[i] for i in (0, 0, 1, 1, 2, 3)], strict=True)
    )
    assert same(load(tmp_path), tensors)
    assert set(load_file(paths[1])) == {"layer.2.w", "layer.3.w"}


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (128, 2),
        ("128", 2),
        ("0.128KB", 2),
        ("0.125 KiB", 2),
        ("127", 4),
        ("1MB", 1),
        ("1tb", 1),
        (1, 4),
    ],
)
def test_sizes(tmp_path: Path, size: int | str, expected: int) -> None:
    assert len(save(tmp_path, make(4, 0.0), size)) == expected


@pytest.mark.parametrize("size", ["", "GB", "5XB", "-1", 0, "0GB", "5 5GB"])
def test_sizes_that_are_none(tmp_path: Path, size: int | str) -> None:
    with pytest.raises(ConfigError, match=r"max_shard_size .*expected bytes, or a number with KB"):
        save(tmp_path, make(1, 0.0), size)


@pytest.mark.parametrize("first", [None, 64, 128, 192, "5GB"])
@pytest.mark.parametrize("second", [64, 128, 192, "5GB"])
def test_second_save_leaves_no_files_of_the_first(
    tmp_path: Path, first: int | str | None, second: int | str
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / ".model-00001-of-00002.safetensors.partial-1").write_text("of a killed save")
    if first is not None:
        save(tmp_path, make(6, 0.0), first)
    paths = save(tmp_path, make(4, 10.0), second)
    index = ["model.safetensors.index.json"] if len(paths) > 1 else []
    assert names(tmp_path) == sorted(["config.json", *index, *(path.name for path in paths)])
    assert same(load(tmp_path), make(4, 10.0))


def in_fork(work: Callable[[], Any]) -> int:
    """Start ``work`` in a process of its own; much faster than a new interpreter with torch."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def was_killed(child: int) -> bool:
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def killed_save(monkeypatch: pytest.MonkeyPatch, at: int, save: Callable[[], Any]) -> bool:
    """Run ``save`` in a process that kills itself before its ``at``-th file operation."""
    remaining = at

    def strike(call: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            nonlocal remaining
            if remaining == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            remaining -= 1
            return call(*args, **kwargs)

        return operation

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", strike(Path.replace))
        patch.setattr(Path, "unlink", strike(Path.unlink))
        patch.setattr(os, "fsync", strike(os.fsync))
        return was_killed(in_fork(save))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("first", [None, 64, 128, "5GB"])
@pytest.mark.parametrize("second", [64, "5GB"])
def test_a_kill_at_any_step_never_shows_a_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int | str | None, second: int | str
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # slow, and only for power losses
    old, new = make(3, 0.0), make(3, 10.0)
    seen: list[str] = []
    killed = True
    while killed:
        folder = tmp_path / str(len(seen))
        folder.mkdir()
        if first is not None:
            save(folder, old, first)
        killed = killed_save(monkeypatch, len(seen), lambda f=folder: save(f, new, second))
        seen.append(seen_as(folder, old, new))
        save(folder, new, second)
        assert same(load(folder), new)
        assert not list(folder.glob(".*"))
    start, files = "nothing" if first is None else "old", 1 if second == "5GB" else 3
    assert seen[-1] == "new"
    assert seen[: files + 1] == [start] * (files + 1)
    if first is not None and first != second:
        assert "nothing" not in seen


def seen_as(folder: Path, old: Tensors, new: Tensors) -> str:
    """What a reader finds; anything but one whole save or no save fails."""
    if not any((folder / name).exists() for name in (SINGLE, INDEX)):
        return "nothing"
    found = load(folder)
    assert same(found, old) or same(found, new)
    return "old" if same(found, old) else "new"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_kill_from_outside_in_the_middle_of_a_shard(tmp_path: Path) -> None:
    save(tmp_path, make(6, 0.0), 128)
    read_end, write_end = os.pipe()

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for i, pair in enumerate(make(6, 10.0).items()):
            if i == 3:
                os.write(write_end, b"x")
                time.sleep(60)
            yield pair

    child = in_fork(lambda: write_sharded(tmp_path, plan(make(6, 10.0)), tensors(), 128))
    assert os.read(read_end, 1) == b"x"
    os.kill(child, signal.SIGKILL)
    assert was_killed(child)
    os.close(read_end)
    os.close(write_end)
    assert same(load(tmp_path), make(6, 0.0))
    assert len(list(tmp_path.glob(".model-*.partial-*"))) == 2
    save(tmp_path, make(6, 20.0), 128)
    assert same(load(tmp_path), make(6, 20.0))
    assert not list(tmp_path.glob(".*"))


def test_an_error_in_the_middle_leaves_the_old_save(tmp_path: Path) -> None:
    save(tmp_path, make(3, 0.0), 64)
    before = names(tmp_path)

    def failing() -> Iterator[tuple[str, torch.Tensor]]:
        yield "layer.0.w", torch.ones(4, 4)
        raise OSError("disk of another rank is gone")

    with pytest.raises(OSError, match="another rank"):
        write_sharded(tmp_path, plan(make(3, 0.0)), failing(), 64)
    assert names(tmp_path) == before
    assert same(load(tmp_path), make(3, 0.0))


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    """No tensor is asked for before the one before it is in its file and gone."""
    given: list[weakref.ref[torch.Tensor]] = []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in make(8, 0.0):
            assert all(ref() is None for ref in given)
            pair = [(name, torch.ones(4, 4))]
            given.append(weakref.ref(pair[0][1]))
            yield pair.pop()

    write_sharded(tmp_path, plan(make(8, 0.0)), tensors(), 256)
    assert len(given) == 8
    assert same(load(tmp_path), {name: torch.ones(4, 4) for name in make(8, 0.0)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[:-1], r"the plan has 'layer\.2\.w' of shape \(4, 4\).*ended before it"),
        (lambda t: [*t, ("more", torch.ones(1))], r"'more' comes after the last one"),
        (lambda t: t[::-1], r"the plan has 'layer\.0\.w' .*, found 'layer\.2\.w'"),
        (lambda t: [(n, x[:2]) for n, x in t], r"found 'layer\.0\.w' of shape \(2, 4\)"),
        (lambda t: [(n, x.half()) for n, x in t], r"found 'layer\.0\.w' .* and torch\.float16"),
    ],
)
def test_tensors_must_follow_the_plan(tmp_path: Path, change: Any, message: str) -> None:
    tensors = make(3, 0.0)
    with pytest.raises(CheckpointError, match=message):
        write_sharded(tmp_path, plan(tensors), change(list(tensors.items())))
    assert names(tmp_path) == []


def test_bad_plans(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="names no tensor"):
        write_sharded(tmp_path, [], [])
    with pytest.raises(CheckpointError, match="the plan has 'a' more than once"):
        write_sharded(tmp_path, [("a", (1,), torch.half)] * 2, [])
