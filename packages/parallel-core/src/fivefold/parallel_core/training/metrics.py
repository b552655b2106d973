"""Where a run's measurements go: a file of JSON lines, TensorBoard, or several of these."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, Protocol

from fivefold.parallel_core.errors import DataError, ParallelError
from fivefold.parallel_core.files import atomic_write_bytes


class Sink(Protocol):
    """Something that keeps measurements."""

    def init(self, step: int = 0, config: Mapping[str, Any] | None = None) -> None:
        """Begin.

        Args:
            step: finished steps of the checkpoint that the run resumes from; 0 is a new run.
            config: plain data that describes the run.
        """
        ...

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Keep what was measured after ``step`` finished steps."""
        ...

    def finish(self) -> None:
        """End; nothing is logged after this."""
        ...


class JsonlSink:
    """One line of JSON a record, ``{"step": 3, "loss": 2.5, ...}``, flushed as it is written.

    A new run starts an empty file. A resumed run first drops the records of steps after its
    checkpoint, which it is going to repeat, and a last line that a kill has cut; the shortened
    file replaces the old one atomically. Numbers that are not finite become null.

    Args:
        path: the file; missing parent folders are made.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file: IO[bytes] | None = None

    def init(self, step: int = 0, config: Mapping[str, Any] | None = None) -> None:
        """Open the file; see ``Sink.init``. The config is not written.

        Raises:
            DataError: the file of the run to resume has a line, before the last, that is no record.
        """
        kept = [_line(record) for record in self._earlier(step)]
        atomic_write_bytes(self.path, b"".join(kept))
        self._file = self.path.open("ab")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one record.

        Args:
            step: finished steps.
            values: numbers, scalar tensors, text or None; the key "step" is taken.

        Raises:
            ParallelError: a value or key of another kind, or a sink that is not open.
        """
        if self._file is None:
            raise ParallelError(f"{self.path}: log() before init() or after finish()")
        if "step" in values:
            raise ParallelError(f"{self.path}: 'step' is the record's own key, not a value's")
        # One write for one line: a kill can cut the last line and no other.
        self._file.write(_line({"step": step} | {k: _plain(k, v) for k, v in values.items()}))
        self._file.flush()

    def finish(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _earlier(self, step: int) -> list[dict[str, Any]]:
        if step <= 0 or not self.path.exists():
            return []
        return [record for record in read_jsonl(self.path) if record["step"] <= step]


class TensorBoardSink:
    """Numbers as TensorBoard scalars; needs the extra ``tensorboard``.

    Args:
        folder: where the event files go.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._writer: Any = None

    def init(self, step: int = 0, config: Mapping[str, Any] | None = None) -> None:
        """Open a writer that hides the steps after ``step`` of earlier runs; see ``Sink.init``.

        Raises:
            ImportError: tensorboard is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                'tensorboard is missing: pip install "fivefold-parallel-core[tensorboard]"'
            ) from error
        self._writer = SummaryWriter(str(self.folder), purge_step=step + 1 if step else 0)
        if config is not None:
            self._writer.add_text("config", f"```\n{json.dumps(config, indent=2)}\n```", step)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Add the values that are numbers.

        Raises:
            ParallelError: a value that no sink takes, or a sink that is not open.
        """
        if self._writer is None:
            raise ParallelError(f"{self.folder}: log() before init() or after finish()")
        for name, value in values.items():
            number = _plain(name, value)
            if isinstance(number, int | float):
                self._writer.add_scalar(name, number, step)

    def finish(self) -> None:
        """Write what is buffered and close."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class Sinks:
    """Several sinks as one.

    Args:
        sinks: each gets every call, in this order.
    """

    def __init__(self, sinks: Iterable[Sink]):
        self.sinks = list(sinks)

    def init(self, step: int = 0, config: Mapping[str, Any] | None = None) -> None:
        """See ``Sink.init``."""
        for sink in self.sinks:
            sink.init(step, config)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """See ``Sink.log``."""
        for sink in self.sinks:
            sink.log(step, values)

    def finish(self) -> None:
        """Finish all, also those after one that fails; the first error is raised."""
        errors = []
        for sink in self.sinks:
            try:
                sink.finish()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The records of a file that ``JsonlSink`` wrote, also while it is being written.

    A last line that is not whole is left out.

    Raises:
        DataError: no such file, or a line before the last that is no record.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"cannot read metrics {path}: {error.strerror}") from None
    whole, rest = lines[:-1], lines[-1]  # what follows the last line feed was cut
    records = [_record(line) for line in whole]
    broken = [i for i, record in enumerate(records) if record is None]
    # A power loss can leave a last line of garbage, with a line feed or without.
    if broken and (broken[0] < len(whole) - 1 or rest):
        line = whole[broken[0]][:40].decode(errors="replace")
        raise DataError(f"{path}, line {broken[0] + 1}: no record of metrics: {line!r}")
    return [record for record in records if record is not None]


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    return record


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"


def _plain(name: str, value: Any) -> int | float | str | None:
    """A scalar tensor or array as its number; nan and infinity, which JSON lacks, as None."""
    if hasattr(value, "item") and math.prod(value.shape) == 1:
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, int | str):
        return value
    raise ParallelError(
        f"metric {name!r} is {type(value).__name__}; expected a number, a tensor with one element, "
        "text or None"
    )
