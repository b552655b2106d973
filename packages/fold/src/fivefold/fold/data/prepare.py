"""Folders of structures and alignments as shards of safetensors, and a report of what is left out.

A shard holds the chains of so many files and says in its header what it was made of; a run that is
killed goes on with the shards that are not there, or whose files have changed since.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from fivefold.fold.data.alignments import SUFFIXES as ALIGNMENT_SUFFIXES
from fivefold.fold.data.alignments import Alignment, join, query_only, read_alignment, sequence_of
from fivefold.fold.data.engines import Engine, run_jobs
from fivefold.fold.data.structures import SUFFIXES, Chain, Structure, read_structure
from fivefold.fold.errors import FoldDataError
from fivefold.parallel_core.files import atomic_write_bytes, write_json

FORMAT = 1
INDEX = "index.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Filters:
    """Which chains are kept; the limits are those of MLPerf's reference.

    Attributes:
        max_resolution: in angstrom, exclusive; structures without one are kept.
        max_single_residue: share of a chain that one kind of residue may be.
        min_seen: residues with an alpha carbon.
        need_alignment: leave out chains without one; else they are their own alignment.
    """

    max_resolution: float = 9.0
    max_single_residue: float = 0.8
    min_seen: int = 4
    need_alignment: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What became of one file, or of a shard of them.

    Attributes:
        chains: one record each of those that were kept.
        dropped: names and reasons of what was left out.
        notes: names and what is unusual about chains that were kept.
    """

    chains: list[dict[str, Any]] = field(default_factory=list)
    dropped: list[dict[str, str]] = field(default_factory=list)
    notes: list[dict[str, str]] = field(default_factory=list)

    def add(self, other: "Found") -> None:
        """Append what another has."""
        self.chains.extend(other.chains)
        self.dropped.extend(other.dropped)
        self.notes.extend(other.notes)


def prepare(
    structures: str | Path,
    out: str | Path,
    *,
    alignments: str | Path | None = None,
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
        (out / f"shard-{n:05}.safetensors", files[i : i + files_per_shard], alignments, filters)
        for n, i in enumerate(range(0, len(files), files_per_shard))
    ]
    _run(jobs, num_workers, progress, engine, address)
    whole = Found()
    for job in jobs:
        whole.add(_header(job[0])[1])
    _drop_repeated(whole)
    write_json(out / INDEX, {"format": FORMAT, **asdict(whole)})
    return whole


_Job = tuple[Path, list[Path], str | Path | None, Filters]


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
    _, files, alignments, filters = job
    parts: list[Any] = [FORMAT, asdict(filters), str(alignments)]
    for path in files:
        related = [path, *_alignment_files(alignments, f"{path.name.split('.')[0]}_*")]
        parts += [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in related]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _header(path: Path) -> tuple[str, Found]:
    with safe_open(path, "np") as file:
        made = json.loads(file.metadata()["made"])
    return made["fingerprint"], Found(**made["found"])


def _is_done(job: _Job) -> bool:
    return job[0].exists() and _header(job[0])[0] == _fingerprint(job)


def _write_shard(job: _Job) -> None:
    path, files, alignments, filters = job
    fingerprint = _fingerprint(job)
    found, tensors = Found(), {}
    for file in files:
        made, arrays = _read_file(file, alignments, filters)
        found.add(made)
        tensors.update(arrays)
    for record in found.chains:
        record["shard"] = path.name
    # One entry: safetensors writes several in no fixed order, and shards should not differ.
    header = {"fingerprint": fingerprint, "found": asdict(found)}
    atomic_write_bytes(path, save(tensors, {"made": json.dumps(header)}))


def _read_file(
    path: Path, alignments: str | Path | None, filters: Filters
) -> tuple[Found, dict[str, Any]]:
    found = Found()
    arrays: dict[str, Any] = {}
    try:
        structure = read_structure(path)
    except FoldDataError as error:
        found.dropped.append({"name": path.name, "reason": str(error)})
        return found, {}
    for chain in structure.chains.values():
        name = f"{structure.name}_{chain.name}"
        reason = _reason_to_drop(structure, chain, filters)
        try:
            alignment = None if reason else _alignment_of(name, chain, alignments)
        except FoldDataError as error:
            reason = str(error)
        if not reason and alignment is None and filters.need_alignment:
            reason = f"there is no alignment {name} in {alignments}"
        if reason:
            found.dropped.append({"name": name, "reason": reason})
            continue
        _note(found, name, chain, alignment is None)
        alignment = alignment or query_only(chain.sequence)
        found.chains.append(_record(name, structure, chain, alignment))
        arrays[f"{name}/positions"] = chain.positions
        arrays[f"{name}/mask"] = chain.mask.astype(np.uint8)
        arrays[f"{name}/classes"] = alignment.classes
        arrays[f"{name}/deletions"] = alignment.deletions
    return found, arrays


def _reason_to_drop(structure: Structure, chain: Chain, filters: Filters) -> str:
    seen = int(chain.mask[:, 1].sum())
    most = max(chain.sequence.count(letter) for letter in set(chain.sequence))
    if structure.resolution >= filters.max_resolution:
        return f"resolution {structure.resolution} Å, below {filters.max_resolution} is kept"
    if seen < filters.min_seen:
        return f"{seen} residues have an alpha carbon, at least {filters.min_seen} are needed"
    if most > filters.max_single_residue * len(chain.sequence):
        return f"{most} of {len(chain.sequence)} residues are of one kind"
    return ""


def _note(found: Found, name: str, chain: Chain, alone: bool) -> None:
    if "X" in chain.sequence:
        places = [str(i + 1) for i, letter in enumerate(chain.sequence) if letter == "X"]
        note = f"unknown residues at {', '.join(places[:10])} ({len(places)} in all)"
        found.notes.append({"name": name, "note": note})
    if alone:
        found.notes.append({"name": name, "note": "no alignment; the chain is its own"})


def _alignment_files(folder: str | Path | None, pattern: str) -> list[Path]:
    if folder is None:
        return []
    paths = [p for place in sorted(Path(folder).glob(pattern)) for p in _within(place)]
    return [p for p in paths if p.name.removesuffix(".gz").endswith(ALIGNMENT_SUFFIXES)]


def _within(place: Path) -> list[Path]:
    return sorted(place.iterdir()) if place.is_dir() else [place]


def _alignment_of(name: str, chain: Chain, folder: str | Path | None) -> Alignment | None:
    files = _alignment_files(folder, name) + _alignment_files(folder, f"{name}.*")
    if not files:
        return None
    alignment = join([read_alignment(path) for path in files])
    theirs = sequence_of(alignment)
    same = len(theirs) == len(chain.sequence) and all(
        a == b or "X" in (a, b) for a, b in zip(theirs, chain.sequence, strict=True)
    )
    if not same:
        raise FoldDataError(f"its alignment is of {theirs!r}, the chain is {chain.sequence!r}")
    return alignment


def _record(name: str, structure: Structure, chain: Chain, alignment: Alignment) -> dict[str, Any]:
    return {
        "name": name,
        "sequence": chain.sequence,
        "num_seen": int(chain.mask[:, 1].sum()),
        "num_rows": len(alignment),
        "resolution": structure.resolution,
        "method": structure.method,
        "release_date": structure.release_date,
    }


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
