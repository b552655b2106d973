"""``fivefold-kernels report``: its arguments, and what it does with them."""

import argparse
from pathlib import Path

from fivefold.kernels.arguments import add_ops, count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``report`` to its parser; imports nothing heavy."""
    parser.description = (
        "Compile every kernel of every installed fivefold package for the sizes of models, "
        "without a GPU, and print registers, spills, shared memory, tensor-core instructions and "
        "the widths of global loads and stores. Exits with 1 where a kernel does not compile."
    )
    add_ops(parser)
    parser.add_argument(
        "--target",
        nargs="+",
        default=["sm_80", "sm_90a", "sm_100"],
        choices=("sm_80", "sm_90a", "sm_100"),
        dest="targets",
        help="architectures (default: all three)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write one record a kernel and target too"
    )
    parser.add_argument(
        "--check",
        type=Path,
        metavar="FILE",
        help="compare with a table that --json wrote; exit with 1 where something got worse",
    )
    parser.add_argument(
        "--jobs", type=count, metavar="N", help="kernels compiled at once (default: one a core)"
    )


def run(options: argparse.Namespace) -> int:
    """``fivefold-kernels report``; 1 where a kernel does not compile or is worse than before."""
    from fivefold.kernels.files import check_writable
    from fivefold.kernels.offline import records
    from fivefold.kernels.offline.compare import broken_laws, compare
    from fivefold.kernels.offline.report import describe, differences, survey
    from fivefold.kernels.selection import select

    check_writable(options.json)
    table = records.read(options.check) if options.check else None
    found, failures = survey(select(options.ops), options.targets, options.jobs)
    print(records.table(found))
    lines = [describe(failure) for failure in failures]
    lines += [f"to mend: {r.title} {fault}" for r in found for fault in broken_laws(r)]
    for line in lines:
        print(line)
    if options.json:
        records.write(options.json, found)
    worse = False
    if table is not None:
        comparison = compare(found, table)
        worse = bool(comparison.worse)
        print("\n".join(differences(comparison)) or "\nas in the table")
    return int(worse or any(not failure.expected for failure in failures))
