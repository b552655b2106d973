"""Checkpoints across layouts, and checkpoints that something happened to."""

import contextlib
import errno
import json
import os
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from fivefold.parallel_core.box import Box
from fivefold.parallel_core.checkpoint import Checkpoints, TensorPart, load_parts, read_state
from fivefold.parallel_core.errors import CheckpointError, RankError
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.training.optimizer import part_of

from .rig import Case, Job, Record, make_job, parallel_run, worst
from .toy import ToyConfig

# ---- from layout to layout -----------------------------------------------------------------

CONFIG = ToyConfig(num_layers=4, num_experts=4)
CHAIN = [
    Case(degrees={"tp": 2, "pp": 2, "ep": 2}, config=CONFIG),
    Case(degrees={"tp": 4, "ep": 2, "etp": 2}, config=CONFIG),
    Case(degrees={"cp": 2, "pp": 2, "ep": 4}, config=CONFIG, stages_per_rank=2, microbatch_size=2),
]
"""The last one trains on."""


def parts_of(job: Job) -> dict[str, TensorPart]:
    """All that training changes."""
    model = {f"model.{piece.name}": part_of(piece, piece.local) for piece in job.pieces}
    return model | job.optimizer.parts()


def differing(job: Job, wholes: Mapping[str, Tensor]) -> list[str]:
    """Parts on this rank that are not, bit for bit, their box of the whole tensors."""
    parts = parts_of(job)
    return [n for n, p in parts.items() if not torch.equal(p.tensor, wholes[n][p.box.slices])]


def copies(job: Job) -> dict[str, Tensor]:
    """The whole tensors of a job of one rank."""
    return {name: part.tensor.clone() for name, part in parts_of(job).items()}


def errors_of(path: Path, wrong: Mapping[str, TensorPart]) -> str:
    try:
        load_parts(path, wrong)
    except CheckpointError as error:
        return str(error)
    return ""


class Travelled:
    """A run of 2 steps in one process that went through every layout of the chain and back.

    Attributes:
        folder: the last checkpoint.
        differing: parts that changed on the way, over all layouts and ranks.
        worst: largest error of the third step, taken under the last layout.
        messages: of each rank, for a missing name and for a wrong shape.
    """

    def __init__(self, folder: Path):
        self.alone = make_job(Case(degrees={}, config=CONFIG, microbatch_size=8))
        parallel_run(self.alone, steps=2)
        self.wholes = copies(self.alone)
        path = Checkpoints(folder / "0").save(2, parts_of(self.alone), {"note": "made alone"})
        third = parallel_run(self.alone, steps=1)
        found = launch(self._travel, 8, folder, path, third, timeout=500)
        self.folder = folder / str(len(CHAIN))
        self.differing = [name for names, _, _ in found for name in names]
        self.worst = max(error for _, error, _ in found)
        self.messages = [messages for _, _, messages in found]

    def _travel(
        self, folder: Path, path: Path, third: Record
    ) -> tuple[list[str], float, tuple[str, str]]:
        changed: list[str] = []
        for index, case in enumerate(CHAIN):
            job = make_job(case)
            load_parts(path, parts_of(job))
            job.optimizer.set_steps(2)
            changed += differing(job, self.wholes)
            path = Checkpoints(folder / str(index + 1)).save(2, parts_of(job), {"index": index})
        error, _ = worst(job, parallel_run(job, steps=1), third)
        load_parts(path, parts_of(job))  # also where FSDP has moved the parameters by now
        changed += differing(job, self.wholes)
        whole, shape = Box((0, 0), (37, 13)), (37, 13)
        missing = {"model.other": TensorPart(torch.zeros(37, 13), whole, shape)}
        wrong = {"model.lm_head.weight": TensorPart(torch.zeros(37, 13), whole, shape)}
        return changed, error, (errors_of(path, missing), errors_of(path, wrong))


@pytest.fixture(scope="module")
def travelled(tmp_path_factory: pytest.TempPathFactory) -> Travelled:
    return Travelled(tmp_path_factory.mktemp("checkpoints"))


def test_parameters_and_moments_pass_through_every_layout_bit_for_bit(
    travelled: Travelled,
) -> None:
    assert not travelled.differing


def test_training_goes_on_under_another_layout_as_in_one_process(travelled: Travelled) -> None:
    assert travelled.worst < 1e-12


def test_one_process_takes_back_what_eight_saved(travelled: Travelled) -> None:
    (path,) = travelled.folder.iterdir()
    fresh = make_job(Case(degrees={}, config=CONFIG))
    assert differing(fresh, travelled.wholes)
    load_parts(path, parts_of(fresh))
    assert not differing(fresh, travelled.wholes)
    assert {key: read_state(path)[key] for key in ("step", "index")} == {"step": 2, "index": 2}


def test_every_element_is_stored_once_under_a_global_name(travelled: Travelled) -> None:
    (path,) = travelled.folder.iterdir()
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    assert set(stored) == set(travelled.wholes)
    for name, tensor in stored.items():
        assert tensor.size == travelled.wholes[name].shape
        assert sum(chunk.sizes.numel() for chunk in tensor.chunks) == tensor.size.numel(), name


def test_what_does_not_fit_is_one_clear_error_on_every_rank(travelled: Travelled) -> None:
    for missing, wrong in travelled.messages:
        assert "cannot be loaded into this model" in missing
        assert "model.other" in missing
        assert "model.lm_head.weight" in wrong
        assert "[37, 12]" in wrong
        assert "[37, 13]" in wrong


# ---- one process ---------------------------------------------------------------------------


def numbers(value: float) -> dict[str, TensorPart]:
    """Two small tensors of one value."""
    return {
        name: TensorPart(torch.full((3,), value), Box((0,), (3,)), (3,)) for name in ("a", "b.c")
    }


def holds(path: Path) -> float:
    """The value that a checkpoint of ``numbers`` was made with."""
    parts = numbers(-1.0)
    load_parts(path, parts)
    (value,) = {x for part in parts.values() for x in part.tensor.tolist()}
    return value


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoints:
    """Checkpoints of steps 1 and 2."""
    checkpoints = Checkpoints(tmp_path / "run", keep=3)
    for step in (1, 2):
        checkpoints.save(step, numbers(step), {"loss": 0.5})
    return checkpoints


def test_state_comes_back_with_the_step(saved: Checkpoints) -> None:
    state = read_state(saved.folder / "step-00000002")
    assert (state["step"], state["loss"]) == (2, 0.5)
    assert saved.steps() == [1, 2]
    assert saved.latest() == saved.folder / "step-00000002"


def test_there_is_no_latest_without_checkpoints(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none").latest() is None
    assert Checkpoints(tmp_path).latest() is None


def test_checkpoints_of_which_none_is_whole_are_an_error_not_a_new_start(
    saved: Checkpoints,
) -> None:
    assert saved.damaged() == {}
    truncate(saved.path(1))
    remove_state(saved.path(2))
    damaged = saved.damaged()
    assert list(damaged) == [1, 2]
    assert "it was saved with" in damaged[1]
    assert "step-00000002 is not a whole checkpoint: FileNotFoundError" in damaged[2]
    with pytest.raises(CheckpointError) as caught:
        saved.latest()
    assert str(caught.value) == (
        f"{saved.folder} has checkpoints after steps 1, 2, but no whole checkpoint: "
        f"step 1: {damaged[1]}; step 2: {damaged[2]}. Remove the folder to start anew"
    )


def test_the_newest_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 10, 100000000):
        checkpoints.save(step, numbers(step), {})
    assert checkpoints.steps() == [10, 100000000]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-100000000"]
    with pytest.raises(CheckpointError, match="keep=0 checkpoints; at least 1"):
        Checkpoints(tmp_path, keep=0)


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_checkpoints_do_not_count_as_kept(tmp_path: Path, keep: int) -> None:
    checkpoints = Checkpoints(tmp_path, keep=keep)
    for step in (6, 7, 8):
        checkpoints.save(step, numbers(step), {})
    checkpoints.path(3).mkdir()
    checkpoints.path(10).mkdir()
    checkpoints.save(9, numbers(9), {})
    assert checkpoints.steps() == [8, 9, 10][-keep - 1 :], "what was before the kept is gone"
    assert list(checkpoints.damaged()) == [10]
    assert checkpoints.latest() == checkpoints.path(9)
    checkpoints.save(10, numbers(10), {})
    assert checkpoints.steps() == [9, 10][-keep:]
    assert holds(checkpoints.path(10)) == 10


def test_the_one_just_saved_stays_though_others_are_newer(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(20, numbers(20), {})
    checkpoints.save(9, numbers(9), {})
    assert checkpoints.steps() == [9, 20]
    assert holds(checkpoints.path(9)) == 9


def test_the_same_step_may_be_saved_again(saved: Checkpoints) -> None:
    saved.save(2, numbers(7.0), {})
    assert saved.steps() == [1, 2]
    assert holds(saved.folder / "step-00000002") == 7.0


def test_leftovers_of_a_killed_save_are_ignored_and_removed(saved: Checkpoints) -> None:
    partial = saved.folder / "step-00000003.partial"
    shutil.copytree(saved.folder / "step-00000002", partial)
    assert saved.steps() == [1, 2]
    assert saved.latest() == saved.folder / "step-00000002"
    saved.save(4, numbers(4.0), {})
    assert not partial.exists()


def truncate(path: Path) -> str:
    file = next(path.glob("*.distcp"))
    os.truncate(file, file.stat().st_size - 1)
    return file.name


def remove_data(path: Path) -> str:
    file = next(path.glob("*.distcp"))
    file.unlink()
    return file.name


def remove_metadata(path: Path) -> str:
    (path / ".metadata").unlink()
    return ".metadata"


def remove_state(path: Path) -> str:
    (path / "state.json").unlink()
    return "step-00000002 is not a whole checkpoint"


def damage_state(path: Path) -> str:
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text[: len(text) // 2])
    return "step-00000002 is not a whole checkpoint"


def empty_state(path: Path) -> str:
    (path / "state.json").write_text("{}")
    return "step-00000002 is not a whole checkpoint: KeyError"


def other_state(path: Path) -> str:
    (path / "state.json").write_text(json.dumps([1, 2]))
    return "step-00000002 is not a whole checkpoint: TypeError"


@pytest.mark.parametrize(
    "harm",
    [truncate, remove_data, remove_metadata, remove_state, damage_state, empty_state, other_state],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    saved: Checkpoints, harm: Callable[[Path], str]
) -> None:
    newest = saved.folder / "step-00000002"
    named = harm(newest)
    assert saved.latest() == saved.folder / "step-00000001"
    for read in (read_state, holds):
        with pytest.raises(CheckpointError) as caught:
            read(newest)
        assert named in str(caught.value)


def test_sizes_are_named_in_the_error(saved: Checkpoints) -> None:
    newest = saved.folder / "step-00000002"
    size = next(newest.glob("*.distcp")).stat().st_size
    truncate(newest)
    with pytest.raises(
        CheckpointError, match=f"has {size - 1} bytes; it was saved with {size} bytes"
    ):
        read_state(newest)


def test_what_does_not_fit_leaves_one_clear_error(saved: Checkpoints) -> None:
    path = saved.folder / "step-00000002"
    with pytest.raises(CheckpointError, match=r"step-00000002 cannot be loaded .*\bx\b"):
        load_parts(path, {"x": numbers(0.0)["a"]})
    with pytest.raises(CheckpointError, match=r"\[3\].*\[4\].*\ba\b"):
        load_parts(path, {"a": TensorPart(torch.zeros(4), Box((0,), (4,)), (4,))})


def test_parts_of_a_rank_may_be_empty(saved: Checkpoints) -> None:
    empty = TensorPart(torch.zeros(0), Box((0,), (0,)), (3,))
    load_parts(saved.folder / "step-00000002", {"a": empty})
    assert empty.tensor.numel() == 0


def test_a_part_takes_only_its_box_in_the_dtype_it_has(saved: Checkpoints) -> None:
    path = saved.save(3, {"a": TensorPart(torch.tensor([1.0, 2, 3]), Box((0,), (3,)), (3,))}, {})
    part = TensorPart(torch.zeros(2, dtype=torch.float64), Box((1,), (2,)), (3,))
    load_parts(path, {"a": part})
    assert part.tensor.tolist() == [2, 3]


CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "fsync"}
"""Python's audit events that change what is on disk; "fsync" is ours, and `open` to write."""


def kill_at_change(number: int, folder: Path) -> None:
    """Save step 2 and be killed just before the disk changes for the given time."""
    real, count = os.fsync, 0

    def fsync(file: int) -> None:
        sys.audit("fsync")
        real(file)

    def watch(event: str, args: tuple[object, ...]) -> None:
        nonlocal count
        writes = event == "open" and "w" in str(args[1]) and str(folder) in str(args[0])
        if writes or event in CHANGES:
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = fsync
    sys.addaudithook(watch)
    Checkpoints(folder).save(2, numbers(2.0), {})


def killed_saves(folder: Path) -> Iterator[int]:
    """Saves of step 2, each killed at a later point; ends with the one that was not."""
    for number in range(1, 100):
        try:
            launch(kill_at_change, 1, number, folder, init=False, timeout=300)
        except RankError as error:
            if "SIGKILL" not in str(error):
                raise
            yield number
        else:
            return


def test_a_save_that_is_killed_anywhere_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, numbers(1.0), {})
    newest = []
    for _ in killed_saves(tmp_path):
        path = checkpoints.latest()
        assert path is not None
        assert holds(path) == int(path.name.removeprefix("step-"))
        assert holds(tmp_path / "step-00000001") == 1.0
        newest.append(path.name)
        shutil.rmtree(tmp_path / "step-00000002", ignore_errors=True)
    assert len(newest) > 8
    assert sorted(newest) == newest, "once it is there it is there"
    assert set(newest) == {"step-00000001", "step-00000002"}
    assert checkpoints.latest() == tmp_path / "step-00000002"
    assert not list(tmp_path.glob("*.partial"))


# ---- saves that fail -----------------------------------------------------------------------


@contextlib.contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """Let the system itself refuse to write on, in bytes of one file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_error(checkpoints: Checkpoints, step: int, parts: Mapping[str, TensorPart]) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoints.save(step, parts, {})
    assert caught.value.__suppress_context__, "torch's own tracebacks are left out"
    return str(caught.value)


def refused(folder: Path, reason: str) -> re.Pattern[str]:
    """The whole message about a save after step 8."""
    start = f"the checkpoint after step 8 cannot be saved in {folder}: OSError: {reason}"
    return re.compile(re.escape(start) + r"[^\n]*; \d+ MB are free there")


def test_a_file_that_cannot_be_written_is_one_line_on_every_rank(tmp_path: Path) -> None:
    """Only rank 1 has much to write, so only it fails; torch's zip writer hides why."""

    def work() -> str:
        rank = dist.get_rank()
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(7, numbers(7.0), {})
        box = Box((rank * 4,), (50_000 if rank else 4,))
        part = TensorPart(torch.ones(box.size), box, (50_004,))
        with no_file_larger_than(20_000):
            return save_error(checkpoints, 8, {"a": part})

    first, second = launch(work, 2, timeout=300)
    assert first == second
    assert refused(tmp_path, "[Errno 27] File too large").fullmatch(first)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]
    assert holds(tmp_path / "step-00000007") == 7.0


@pytest.mark.parametrize("call", ["mkdir", "fsync", "rename"])
def test_a_full_disk_is_told_wherever_it_shows(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def work() -> str:
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(7, numbers(7.0), {})
        if dist.get_rank() == 0:
            monkeypatch.setattr(os, call, full)
        return save_error(checkpoints, 8, numbers(8.0))

    first, second = launch(work, 2, timeout=300)
    assert first == second
    assert refused(tmp_path, "[Errno 28] No space left on device").fullmatch(first)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]
    assert holds(tmp_path / "step-00000007") == 7.0


def test_a_folder_that_cannot_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "run"
    message = save_error(Checkpoints(folder), 8, numbers(8.0))
    assert f"cannot be saved in {folder}: NotADirectoryError: " in message
    assert message.endswith(" MB are free there")


def test_a_save_that_failed_may_be_done_again(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    with no_file_larger_than(100):
        save_error(checkpoints, 8, numbers(8.0))
    assert checkpoints.latest() is None
    assert holds(checkpoints.save(8, numbers(8.0), {})) == 8.0
