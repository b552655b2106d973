"""Tables of a compression: each as JSON, which a later stage reads, and as CSV for people."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fivefold.hybrid_ssm.errors import HybridError
from fivefold.parallel_core.files import atomic_write_text, write_json


def write_table(stem: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``stem.csv`` and then ``stem.json``, all or nothing each; all rows have one form."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _cell(value) for key, value in row.items()})
    atomic_write_text(stem.with_suffix(".csv"), text.getvalue())
    # Last: it says that the stage is done.
    write_json(stem.with_suffix(".json"), list(rows))


def read_table(stem: Path) -> list[dict[str, Any]] | None:
    """The rows of a table that is there, or None.

    Raises:
        HybridError: the file is no table.
    """
    path = stem.with_suffix(".json")
    if not path.exists():
        return None
    try:
        rows = json.loads(path.read_text())
    except ValueError as error:
        raise HybridError(f"{path} is not a table: {error}; delete it to make it anew") from None
    if not isinstance(rows, list):
        raise HybridError(f"{path} is not a table: it holds a {type(rows).__name__}; delete it")
    return rows


def _cell(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
