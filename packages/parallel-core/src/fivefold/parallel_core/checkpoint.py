"""Checkpoints that are saved under one layout and loaded under another.

Tensors are stored by ``torch.distributed.checkpoint`` under global names and in boxes of the whole
tensor, so nothing in the files knows how many ranks wrote them. A checkpoint appears in one
``rename`` when all of it is on disk; until then it has a name that no reader takes.
"""

import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from fivefold.parallel_core._compat import new_group
from fivefold.parallel_core.background import Background
from fivefold.parallel_core.checkpoint_files import (
    STATE,
    damage,
    damage_inside,
    describe,
    read_state,
)
from fivefold.parallel_core.errors import CheckpointError
from fivefold.parallel_core.files import atomic_write_text, sync_folder
from fivefold.parallel_core.retention import Retention
from fivefold.parallel_core.tensor_part import (
    PartLoadPlanner,
    PartSavePlanner,
    PartWriter,
    TensorPart,
)
from fivefold.parallel_core.together import Together

__all__ = ["Checkpoints", "Retention", "TensorPart", "load_parts", "read_state"]

_METADATA = ".metadata"
_NAME = re.compile(r"step-(\d{8,})")


class Checkpoints:
    """The checkpoints of one run: ``step-00000100`` and so on in one folder.

    Args:
        folder: the run's folder of checkpoints, on storage that all ranks share.
        keep: how many of the newest whole ones to keep, or a ``Retention``; what is older and not
            kept is removed after a newer one is whole.
    """

    def __init__(self, folder: Path | str, keep: int | Retention = 2):
        self.folder = Path(folder)
        self.retention = keep if isinstance(keep, Retention) else Retention(last=keep)
        self._background = Background("checkpoint")
        self._copies: dict[str, Tensor] = {}
        self._apart: dist.ProcessGroup | None = None

    def path(self, step: int) -> Path:
        """Where the checkpoint after ``step`` steps is."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, parts: Mapping[str, TensorPart], state: Mapping[str, Any]) -> Path:
        """Save on all ranks together; returns when the checkpoint is whole.

        One that is still being written in the background is waited for first.

        Args:
            step: number of finished steps.
            parts: name to ``TensorPart``; copies that several ranks hold are written once.
            state: small plain data of the run, the same on every rank; stored as JSON.

        Raises:
            CheckpointError: it cannot be written, with the reason and the free space, the same on
                every rank. Earlier checkpoints stay.
        """
        self.wait()
        return self._save(step, parts, state, Together())

    def start(self, step: int, parts: Mapping[str, TensorPart], state: Mapping[str, Any]) -> None:
        """Save the values of this moment in the background; all ranks together.

        Returns when the parts are copied to host memory, which is kept for the next time: one
        copy of what this rank holds. The ranks then agree over a group of their own, so training
        may go on with any collective. An earlier one that is under way is waited for first.

        Args:
            step: number of finished steps.
            parts: as in ``save``.
            state: as in ``save``.

        Raises:
            CheckpointError: the one before could not be written.
        """
        self.wait()
        if self._apart is None and dist.is_initialized():
            self._apart = new_group(range(dist.get_world_size()), backend="gloo")
        plain = json.loads(json.dumps(dict(state)))
        work = partial(self._save, step, self._copy(parts), plain, Together(self._apart))
        self._background.start(work)

    def wait(self) -> None:
        """Return when no checkpoint is under way.

        Raises:
            CheckpointError: the last one could not be written; raised once.
        """
        self._background.wait()

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is being written in the background."""
        return self._background.is_busy

    @property
    def has_failed(self) -> bool:
        """Whether one could not be written in the background; ``wait`` raises the reason."""
        return self._background.has_failed

    def _copy(self, parts: Mapping[str, TensorPart]) -> dict[str, TensorPart]:
        """Parts with the same values in memory of our own."""
        earlier, self._copies = self._copies, {}
        for name, part in parts.items():
            copy = earlier.get(name)
            if copy is None or (copy.shape, copy.dtype) != (part.tensor.shape, part.tensor.dtype):
                copy = torch.empty(part.tensor.shape, dtype=part.tensor.dtype, device="cpu")
            self._copies[name] = copy.copy_(part.tensor.detach())
        return {n: TensorPart(self._copies[n], part.box, part.shape) for n, part in parts.items()}

    def _save(
        self,
        step: int,
        parts: Mapping[str, TensorPart],
        state: Mapping[str, Any],
        together: Together,
    ) -> Path:
        final = self.path(step)
        partial = final.with_suffix(".partial")
        try:
            together.on_first(lambda: _make_anew(partial))
            writer = PartWriter(partial)
            with _alone_is_fine(together.is_alone):
                save(
                    dict(parts),
                    storage_writer=writer,
                    planner=PartSavePlanner(),
                    process_group=together.group,
                    no_dist=together.is_alone,
                )
            names = [_METADATA] * (together.rank == 0) + list(writer.written)
            found = together.on_each(lambda: describe(partial, names))
            files = {name: of for each in found for name, of in sorted(each.items())}
            whole = {**state, "step": step, "files": files}
            together.on_first(lambda: self._finish(partial, final, whole))
        except (OSError, CheckpointException) as error:
            # All ranks come here together: torch and Together tell all of a rank's error.
            message = self._why_not(step, error) if together.rank == 0 else ""
            if together.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(together.from_first(message)) from None
        return final

    def _why_not(self, step: int, error: BaseException) -> str:
        cause = _cause(error)
        lines = str(cause).splitlines() or ["no reason given"]  # the first; torch adds C++ frames
        return (
            f"the checkpoint after step {step} cannot be saved in {self.folder}: "
            f"{type(cause).__name__}: {lines[0]}; {_free_space(self.folder)}"
        )

    def _finish(self, partial: Path, final: Path, state: dict[str, Any]) -> None:
        atomic_write_text(partial / STATE, json.dumps(state, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync_folder(self.folder)
        self._prune(state["step"])

    def _prune(self, saved: int) -> None:
        """Remove what is older than the newest whole ones and than the one just saved."""
        damaged = self.damaged()
        whole = [step for step in self.steps() if step not in damaged]
        kept = self.retention.keeps(whole, self._metric)
        oldest = min(saved, *whole[-self.retention.last :])
        old = [self.path(step) for step in self.steps() if step < oldest and step not in kept]
        for leftover in (*old, *self.folder.glob("step-*.partial")):
            shutil.rmtree(leftover, ignore_errors=True)

    def _metric(self, step: int) -> float | None:
        value = read_state(self.path(step)).get(self.retention.metric)
        return float(value) if isinstance(value, int | float) else None

    def steps(self) -> list[int]:
        """Steps after which there is a checkpoint, whole or damaged, oldest first."""
        if not self.folder.is_dir():
            return []
        names = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def damaged(self) -> dict[int, str]:
        """Steps whose checkpoint is not whole, oldest first, each with what is wrong with it."""
        wrong = {step: damage(self.path(step)) for step in self.steps()}
        return {step: what for step, what in wrong.items() if what}

    def latest(self, *, contents: bool = False) -> Path | None:
        """The newest checkpoint all of whose files are there and of the right size.

        Args:
            contents: read every byte and compare it with its digest too; all ranks together.

        Returns:
            Its folder; None where there are no checkpoints at all.

        Raises:
            CheckpointError: there are checkpoints, but none of them is whole.
        """
        look = damage_inside if contents else damage
        wrong: dict[int, str] = {}
        for step in reversed(self.steps()):
            wrong[step] = look(self.path(step))
            if not wrong[step]:
                return self.path(step)
        if wrong:
            steps = sorted(wrong)
            reasons = "; ".join(f"step {step}: {wrong[step]}" for step in steps)
            raise CheckpointError(
                f"{self.folder} has checkpoints after steps {', '.join(map(str, steps))}, but no "
                f"whole checkpoint: {reasons}. Remove the folder to start anew"
            )
        return None


def load_parts(path: Path | str, parts: Mapping[str, Any]) -> None:
    """Fill ``parts`` in place from a checkpoint, on all ranks together, whatever wrote it.

    Raises:
        CheckpointError: a name is not in the checkpoint or has another shape there.
    """
    read_state(path)
    try:
        with _alone_is_fine(not dist.is_initialized()):
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
def _alone_is_fine(is_alone: bool) -> Iterator[None]:
    """Keep torch from warning that there is one process where one is meant."""
    if not is_alone:  # else it changes what other threads see, too
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
