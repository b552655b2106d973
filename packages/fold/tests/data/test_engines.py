"""Every engine does every job once, by its own API; what is missing is named."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest

from fivefold.fold.data.engines import run_jobs
from fivefold.fold.errors import FoldDataError


def note(job: tuple[str, int]) -> None:
    """Leave a file; of the number 13 nothing but an error."""
    folder, number = job
    if number == 13:
        raise FoldDataError("unlucky")
    with Path(folder, str(number)).open("a") as file:
        file.write("x")


class Done:
    """A future whose work was done when it was made."""

    def __init__(self, work: Callable[[Any], None], job: Any):
        self.result = lambda: work(job)


class FakeClient:
    """The part of Dask's client that is used, without its processes."""

    made: ClassVar[list[dict[str, Any]]] = []
    closed: ClassVar[int] = 0

    def __init__(self, address: str | None = None, **options: Any):
        self.made.append({"address": address, **options})

    def map(self, work: Callable[[Any], None], jobs: list[Any], *, pure: bool) -> list[Done]:
        assert not pure  # a job that is done again has files to write again
        return [Done(work, job) for job in jobs]

    def close(self) -> None:
        type(self).closed += 1


@pytest.fixture
def dask(monkeypatch: pytest.MonkeyPatch) -> type[FakeClient]:
    module: Any = ModuleType("distributed")
    module.Client, module.as_completed = FakeClient, reversed
    module.default_client = lambda: (_ for _ in ()).throw(ValueError("no clients found"))
    monkeypatch.setitem(sys.modules, "distributed", module)
    FakeClient.made, FakeClient.closed = [], 0
    return FakeClient


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The part of Ray that is used; ``told`` says how it was started and ended."""
    module: Any = ModuleType("ray")
    module.told = []
    module.is_initialized = lambda: False
    module.init = lambda **options: module.told.append(options)
    module.shutdown = lambda: module.told.append("shutdown")

    class Remote:
        def __init__(self, work: Callable[[Any], None]):
            self.remote = lambda job: Done(work, job)

    module.remote = Remote
    module.wait = lambda waiting: (waiting[:1], waiting[1:])
    module.get = lambda ready: [each.result() for each in ready]
    monkeypatch.setitem(sys.modules, "ray", module)
    return module


def jobs(folder: Path, count: int = 5) -> list[tuple[str, int]]:
    return [(str(folder), number) for number in range(count)]


def check(folder: Path) -> None:
    assert {path.name: path.read_text() for path in folder.iterdir()} == dict.fromkeys("01234", "x")


def test_this_process(tmp_path: Path) -> None:
    assert len(list(run_jobs(note, jobs(tmp_path)))) == 5
    check(tmp_path)


def test_dask(tmp_path: Path, dask: type[FakeClient]) -> None:
    assert len(list(run_jobs(note, jobs(tmp_path), engine="dask", num_workers=3))) == 5
    check(tmp_path)
    assert dask.made[0]["n_workers"] == 3 and dask.closed == 1
    with pytest.raises(FoldDataError, match="unlucky"):
        list(run_jobs(note, [(str(tmp_path), 13)], engine="dask", address="tcp://there:8786"))
    assert dask.made[1] == {"address": "tcp://there:8786"} and dask.closed == 2


def test_ray(tmp_path: Path, ray: Any) -> None:
    assert len(list(run_jobs(note, jobs(tmp_path), engine="ray", num_workers=3))) == 5
    check(tmp_path)
    assert ray.told == [{"num_cpus": 3}, "shutdown"]
    with pytest.raises(FoldDataError, match="unlucky"):
        list(run_jobs(note, [(str(tmp_path), 13)], engine="ray", address="auto"))
    assert ray.told[2:] == [{"address": "auto"}, "shutdown"]


@pytest.mark.parametrize(("engine", "module"), [("dask", "distributed"), ("ray", "ray")])
def test_an_engine_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, engine: Any, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"fivefold-fold\[{engine}\]"):
        list(run_jobs(note, [], engine=engine))


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(FoldDataError, match="no engine 'spark'"):
        run_jobs(note, [], engine="spark")  # type: ignore[arg-type]
    with pytest.raises(FoldDataError, match="no scheduler at x"):
        run_jobs(note, [], address="x")
