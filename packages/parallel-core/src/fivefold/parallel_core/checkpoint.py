"""Checkpoints that are saved under one layout and loaded under another.

Tensors are stored by ``torch.distributed.checkpoint`` under global names and in boxes of the whole
tensor, so nothing in the files knows how many ranks wrote them. A checkpoint appears in one
``rename`` when all of it is on disk; until then it has a name that no reader takes.
"""

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from fivefold.parallel_core.errors import CheckpointError
from fivefold.parallel_core.files import atomic_write_text, sync_folder
from fivefold.parallel_core.tensor_part import (
    PartLoadPlanner,
    PartSavePlanner,
    PartWriter,
    TensorPart,
)

__all__ = ["Checkpoints", "TensorPart", "load_parts", "read_state"]

_STATE = "state.json"
_NAME = re.compile(r"step-(\d{8,})")


class Checkpoints:
    """The checkpoints of one run: ``step-00000100`` and so on in one folder.

    Args:
        folder: the run's folder of checkpoints, on storage that all ranks share.
        keep: how many of the newest whole ones to keep; what is older than these is removed after
            a newer one is whole.
    """

    def __init__(self, folder: Path | str, keep: int = 2):
        if keep < 1:
            raise CheckpointError(f"keep={keep} checkpoints; at least 1 must be kept")
        self.folder, self.keep = Path(folder), keep

    def path(self, step: int) -> Path:
        """Where the checkpoint after ``step`` steps is."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, parts: Mapping[str, Any], state: Mapping[str, Any]) -> Path:
        """Save on all ranks together; returns when the checkpoint is whole.

        Args:
            step: number of finished steps.
            parts: name to ``TensorPart``; copies that several ranks hold are written once.
            state: small plain data of the run, the same on every rank; stored as JSON.

        Raises:
            CheckpointError: it cannot be written, with the reason and the free space, the same on
                every rank. Earlier checkpoints stay.
        """
        final = self.path(step)
        partial = final.with_suffix(".partial")
        try:
            _on_first_rank(lambda: _make_anew(partial))
            with _alone_is_fine():
                save(
                    dict(parts),
                    storage_writer=PartWriter(partial),
                    planner=PartSavePlanner(),
                    no_dist=not dist.is_initialized(),
                )
            _on_first_rank(lambda: self._finish(partial, final, {**state, "step": step}))
        except (OSError, CheckpointException) as error:
            # All ranks come here together: torch and _on_first_rank tell all of a rank's error.
            message = self._why_not(step, error) if _rank() == 0 else ""
            if _rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(_from_first_rank(message)) from None
        return final

    def _why_not(self, step: int, error: BaseException) -> str:
        cause = _cause(error)
        lines = str(cause).splitlines() or ["no reason given"]  # the first; torch adds C++ frames
        return (
            f"the checkpoint after step {step} cannot be saved in {self.folder}: "
            f"{type(cause).__name__}: {lines[0]}; {_free_space(self.folder)}"
        )

    def _finish(self, partial: Path, final: Path, state: dict[str, Any]) -> None:
        state["files"] = {f.name: f.stat().st_size for f in sorted(partial.iterdir())}
        atomic_write_text(partial / _STATE, json.dumps(state, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync_folder(self.folder)
        self._prune(state["step"])

    def _prune(self, saved: int) -> None:
        """Remove what is older than the newest whole ones and than the one just saved."""
        damaged = self.damaged()
        whole = [step for step in self.steps() if step not in damaged]
        oldest = min(saved, *whole[-self.keep :])
        old = [self.path(step) for step in self.steps() if step < oldest]
        for leftover in (*old, *self.folder.glob("step-*.partial")):
            shutil.rmtree(leftover, ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps after which there is a checkpoint, whole or damaged, oldest first."""
        if not self.folder.is_dir():
            return []
        names = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def damaged(self) -> dict[int, str]:
        """Steps whose checkpoint is not whole, oldest first, each with what is wrong with it."""
        wrong = {step: _damage(self.path(step)) for step in self.steps()}
        return {step: what for step, what in wrong.items() if what}

    def latest(self) -> Path | None:
        """The newest checkpoint all of whose files are there and of the right size.

        Returns:
            Its folder; None where there are no checkpoints at all.

        Raises:
            CheckpointError: there are checkpoints, but none of them is whole.
        """
        steps = self.steps()
        for step in reversed(steps):
            if not _damage(self.path(step)):
                return self.path(step)
        if steps:
            reasons = "; ".join(f"step {step}: {what}" for step, what in self.damaged().items())
            raise CheckpointError(
                f"{self.folder} has checkpoints after steps {', '.join(map(str, steps))}, but no "
                f"whole checkpoint: {reasons}. Remove the folder to start anew"
            )
        return None


def _damage(path: Path) -> str:
    """What is wrong with a checkpoint; empty where it is whole."""
    try:
        read_state(path)
    except CheckpointError as error:
        return str(error)
    return ""


def read_state(path: Path | str) -> dict[str, Any]:
    """The plain data saved with a checkpoint, after a look at its files.

    Raises:
        CheckpointError: it is not a checkpoint, or a file is missing or of another size.
    """
    path = Path(path)
    try:
        state: dict[str, Any] = json.loads((path / _STATE).read_text())
        files = dict(state["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a whole checkpoint: {error!r}") from None
    for name, size in files.items():
        found = (path / name).stat().st_size if (path / name).exists() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes"
            raise CheckpointError(f"{path / name} {what}; it was saved with {size} bytes")
    return state


def load_parts(path: Path | str, parts: Mapping[str, Any]) -> None:
    """Fill ``parts`` in place from a checkpoint, on all ranks together, whatever wrote it.

    Raises:
        CheckpointError: a name is not in the checkpoint or has another shape there.
    """
    read_state(path)
    try:
        with _alone_is_fine():
            load(
                dict(parts),
                checkpoint_id=path,
                planner=PartLoadPlanner(),
                no_dist=not dist.is_initialized(),
            )
    except (RuntimeError, ValueError, OSError, CheckpointException) as error:
        raise CheckpointError(
            f"{path} cannot be loaded into this model: {_cause(error)}"
        ) from error


def _cause(error: BaseException) -> BaseException:
    """What went wrong on the first rank that failed."""
    if isinstance(error, CheckpointException) and error.failures:
        return next(iter(error.failures.values()))[0]
    return error


def _free_space(folder: Path) -> str:
    """How much more fits where ``folder`` is or would be, in words."""
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        return f"{shutil.disk_usage(there).free / 1e6:.0f} MB are free there"
    except OSError as error:
        return f"how much is free there is not known ({error})"


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    """Keep torch from warning that there is one process where one is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _on_first_rank(act: Callable[[], None]) -> None:
    """Let rank 0 act while the others wait; the system's error there is raised on every rank."""
    failed: OSError | None = None
    if _rank() == 0:
        try:
            act()
        except OSError as error:
            failed = error
    failed = _from_first_rank(failed)
    if failed is not None:
        raise failed


def _from_first_rank(value: Any) -> Any:
    """Rank 0's value, on every rank, when all have come here."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
