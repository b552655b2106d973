"""Break every sign, bound and mask of ops' kernels: ``python -m fivefold.kernels.testing OP``.

Prints the mutants that the op's samples do not notice, and how many there were.
"""

import argparse
import os
import sys

# Before anything imports triton: it looks once.
os.environ["TRITON_INTERPRET"] = "1"

import torch

from fivefold.kernels.samples import OpSamples, load
from fivefold.kernels.selection import select
from fivefold.kernels.testing.checks import check_backend
from fivefold.kernels.testing.mutation import folder_of, mutants_of, survives


def main() -> int:
    """The exit status: 0 where every mutant was noticed."""
    parser = argparse.ArgumentParser(prog="python -m fivefold.kernels.testing", description=__doc__)
    parser.add_argument("ops", nargs="+", metavar="OP", help="rms_norm, or PACKAGE/OP")
    parser.add_argument("--backend", default="triton", choices=("triton", "cpu"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    ops = [load(op, package) for package, op in select(options.ops)]
    survivors = [_survivors(op, options.backend) for op in ops]
    return 1 if any(survivors) else 0


def _survivors(op: OpSamples, backend: str) -> int:
    folder = folder_of(op)
    check_backend(op, backend)  # the kernel as it is passes, or nothing below means anything
    mutants = mutants_of(folder, backend)
    count = 0
    for mutant in mutants:
        if survives(folder, backend, mutant, lambda: check_backend(op, backend)):
            count += 1
            print(f"{op.name}: {mutant}", flush=True)
    print(f"{op.name}: {len(mutants)} mutants on {backend}, {count} unnoticed")
    return count


if __name__ == "__main__":
    sys.exit(main())
