"""Folders of structures and alignments as shards of safetensors, and a report of what is left out.

A shard holds the chains of so many files and says in its header what it was made of; a run that is
killed goes on with the shards that are not there, or whose files have changed since.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.numpy import save

from fivefold.fold.data.engines import Engine, run_jobs
from fivefold.fold.data.reading import HITS, Filters, Found, alignment_files, read_file
from fivefold.fold.data.structures import SUFFIXES
from fivefold.fold.errors import FoldDataError
from fivefold.parallel_core.files import atomic_write_bytes, write_json

FORMAT = 1
INDEX = "index.json"

__all__ = ["FORMAT", "INDEX", "Filters", "Found", "prepare"]


def prepare(
    structures: str | Path,
    out: str | Path,
    *,
    alignments: str | Path | None = None,
    templates: str | Path | None = None,
    filters: Filters | None = None,
    files_per_shard: int = 64,
    num_workers: int = 1,
    progress: bool = True,
    engine: Engine = "processes",
    address: str | None = None,
) -> Found:
    """Read every structure of a folder and write shards and ``index.json``.

    Args:
        structures: folder, with subfolders, of files such as 1abc.cif.gz.
        out: folder to write to.
        alignments: folder with a folder 1abc_A for each chain, of one or more a3m or Stockholm
            files, which are joined in the order of their names; or with files 1abc_A.a3m.
        templates: folder of structures that the .hhr files in a chain's folder of alignments name;
            those released before the chain's own entry become its templates.
        filters: what is kept.
        files_per_shard: structures in one shard.
        num_workers: processes that read.
        progress: show how far it is.
        engine: who reads; see ``data.engines.run_jobs``. Beyond one machine, folders are storage
            that all share.
        address: of the engine's scheduler.

    Returns:
        What ``index.json`` says too.

    Raises:
        FoldDataError: there is no such folder, or no structure in it.
        ImportError: the engine is not installed.
    """
    if files_per_shard < 1:
        raise FoldDataError(f"a shard holds at least 1 file, asked for {files_per_shard}")
    files = list(_structure_files(Path(structures)))
    if not files:
        raise FoldDataError(f"{structures} has no structure; looked for {', '.join(SUFFIXES)}, .gz")
    if alignments is not None and not Path(alignments).is_dir():
        raise FoldDataError(f"there is no folder {alignments} of alignments")
    out, filters = Path(out), filters or Filters()
    jobs = [
        (
            out / f"shard-{n:05}.safetensors",
            files[i : i + files_per_shard],
            alignments,
            templates,
            filters,
        )
        for n, i in enumerate(range(0, len(files), files_per_shard))
    ]
    _run(jobs, num_workers, progress, engine, address)
    whole = Found()
    for job in jobs:
        whole.add(_header(job[0])[1])
    _drop_repeated(whole)
    write_json(out / INDEX, {"format": FORMAT, **asdict(whole)})
    return whole


_Job = tuple[Path, list[Path], str | Path | None, str | Path | None, Filters]


def _structure_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        plain = Path(path.stem) if path.suffix == ".gz" else path
        if plain.suffix.lower() in SUFFIXES and path.is_file():
            yield path


def _run(
    jobs: Sequence[_Job], num_workers: int, progress: bool, engine: Engine, address: str | None
) -> None:
    from fivefold.parallel_core.training.progress import Progress

    waiting = [job for job in jobs if not _is_done(job)]
    with Progress(len(jobs), len(jobs) - len(waiting), progress, interval=5.0) as bar:
        done = run_jobs(
            _write_shard, waiting, engine=engine, num_workers=num_workers, address=address
        )
        for _ in done:
            bar.update()


def _fingerprint(job: _Job) -> str:
    """Of all that a shard is made of: names, sizes and times of files, and the filters."""
    _, files, alignments, templates, filters = job
    parts: list[Any] = [FORMAT, asdict(filters), str(alignments), str(templates)]
    for path in files:
        names = f"{path.name.split('.')[0]}_*"
        related = [
            path,
            *alignment_files(alignments, names),
            *alignment_files(alignments, names, HITS),
        ]
        parts += [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in related]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _header(path: Path) -> tuple[str, Found]:
    with safe_open(path, "np") as file:
        made = json.loads(file.metadata()["made"])
    return made["fingerprint"], Found(**made["found"])


def _is_done(job: _Job) -> bool:
    return job[0].exists() and _header(job[0])[0] == _fingerprint(job)


def _write_shard(job: _Job) -> None:
    path, files, alignments, templates, filters = job
    fingerprint = _fingerprint(job)
    found, tensors = Found(), {}
    for file in files:
        made, arrays = read_file(file, alignments, templates, filters)
        found.add(made)
        tensors.update(arrays)
    for record in found.chains:
        record["shard"] = path.name
    # One entry: safetensors writes several in no fixed order, and shards should not differ.
    header = {"fingerprint": fingerprint, "found": asdict(found)}
    atomic_write_bytes(path, save(tensors, {"made": json.dumps(header)}))


def _drop_repeated(found: Found) -> None:
    """Of chains of one name, which come of an entry that is there twice, keep the first."""
    seen: set[str] = set()
    kept = []
    for record in found.chains:
        if record["name"] in seen:
            reason = f"a chain of that name is in another file too; {record['shard']} has it again"
            found.dropped.append({"name": record["name"], "reason": reason})
        else:
            kept.append(record)
        seen.add(record["name"])
    found.chains[:] = kept
