"""The scan on a CPU: time and memory of ours against transformers' torch path.

python scan.py --json scan.json

Time is that of the CPU on one thread, the least of interleaved rounds. Memory is what a process of
its own reaches beyond what it held before the call, the result included.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fivefold.hybrid_ssm.ops.ssd_scan import ssd_scan
from fivefold.kernels.bench import machine

# Heads, groups, tokens; 64 values in a head and 128 of state.
TIMED = ((16, 2, 2048), (16, 8, 2048), (64, 8, 2048), (16, 2, 8192))
WEIGHED = ((32, 8, 2048), (32, 8, 4096), (32, 8, 8192))
HEAD_DIM, STATE = 64, 128
NAMES = ("ours", "transformers")


def main() -> int:
    """1 where the two do not compute the same."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures too")
    parser.add_argument("--weigh", nargs=5, metavar=("NAME", "PASS", "H", "G", "S"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.weigh is not None:
        print(weigh_here(*options.weigh[:2], *map(int, options.weigh[2:])))
        return 0
    found: dict[str, Any] = {
        "machine": machine.describe("cpu", 1),
        "versions": machine.versions(["transformers"]),
        "head_dim": HEAD_DIM,
        "state": STATE,
        "seconds": [seconds(*sizes, options.rounds) for sizes in TIMED],
        "bytes": [weigh(*sizes) for sizes in WEIGHED],
    }
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(each["largest_difference"] > 1e-4 for each in found["seconds"]))


def inputs(num_heads: int, num_groups: int, num_tokens: int) -> list[Tensor]:
    """x, dt, A, B, C, D and the bias of step sizes: leaves."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    A = -torch.rand(num_heads, generator=generator).mul_(15).add_(1)  # noqa: N806
    tokens = (1, num_tokens)
    return [
        normal(*tokens, num_heads, HEAD_DIM),
        normal(*tokens, num_heads),
        A.requires_grad_(),
        normal(*tokens, num_groups, STATE),
        normal(*tokens, num_groups, STATE),
        normal(num_heads),
        normal(num_heads).detach().sub_(3).requires_grad_(),
    ]


def scan_of(name: str) -> Callable[[list[Tensor]], Tensor]:
    """A scan by the name of whose it is."""
    if name == "ours":
        return (
            lambda each: ssd_scan(  # type: ignore[return-value]
                *each[:5], D=each[5], dt_bias=each[6], dt_softplus=True
            )
        )
    from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_chunk_scan

    return lambda each: mamba2_chunk_scan(
        *each[:5], 128, D=each[5], dt_bias=each[6], dt_softplus=True
    )


def both_passes(scan: Callable[[list[Tensor]], Tensor], leaves: list[Tensor]) -> None:
    """Forward and backward."""
    torch.autograd.grad(scan(leaves).sum(), leaves)


def seconds(num_heads: int, num_groups: int, num_tokens: int, rounds: int) -> dict[str, Any]:
    """The least of both, forward and both passes."""
    leaves = inputs(num_heads, num_groups, num_tokens)
    scans = {name: scan_of(name) for name in NAMES}
    with torch.no_grad():
        ours, theirs = (scan(leaves) for scan in scans.values())
        scale = theirs.square().mean().sqrt()
        difference = float((ours - theirs).abs().max() / scale)
    least = {f"{name} {kind}": math.inf for name in NAMES for kind in ("forward", "both")}
    for _ in range(rounds):
        for name, scan in scans.items():
            with torch.no_grad():
                least[f"{name} forward"] = min(least[f"{name} forward"], cpu_time(scan, leaves))
            spent = cpu_time(lambda scan=scan: both_passes(scan, leaves))
            least[f"{name} both"] = min(least[f"{name} both"], spent)
    found = {"heads": num_heads, "groups": num_groups, "tokens": num_tokens, **least}
    for kind in ("forward", "both"):
        found[f"ratio {kind}"] = least[f"transformers {kind}"] / least[f"ours {kind}"]
    found["largest_difference"] = difference
    show(found)
    return found


def cpu_time(function: Callable[..., Any], *arguments: Any) -> float:
    """Of one call."""
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


def weigh(num_heads: int, num_groups: int, num_tokens: int) -> dict[str, Any]:
    """Bytes of each, in a process of its own."""
    found: dict[str, Any] = {"heads": num_heads, "groups": num_groups, "tokens": num_tokens}
    sizes = [str(each) for each in (num_heads, num_groups, num_tokens)]
    for kind in ("forward", "both"):
        for name in NAMES:
            command = [sys.executable, __file__, "--weigh", name, kind, *sizes]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[f"{name} {kind}"] = int(done.stdout.split()[-1])
        found[f"ratio {kind}"] = found[f"transformers {kind}"] / found[f"ours {kind}"]
    show(found)
    return found


def weigh_here(name: str, kind: str, num_heads: int, num_groups: int, num_tokens: int) -> int:
    """The most memory that a call takes beyond what there is before it."""
    scan, leaves = scan_of(name), inputs(num_heads, num_groups, num_tokens)
    # What is loaded or compiled once is no part of it.
    small = inputs(num_heads, num_groups, 8)
    both_passes(scan, small)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    if kind == "forward":
        with torch.no_grad():
            scan(leaves)
    else:
        both_passes(scan, leaves)
    return status("VmHWM") - before


def status(name: str) -> int:
    """A figure of this process, in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise OSError(f"/proc/self/status has no {name}")
    return int(found[1]) * 1024


def show(found: dict[str, Any]) -> None:
    """One line."""
    print(", ".join(f"{name} {value:.4g}" for name, value in found.items()), flush=True)


if __name__ == "__main__":
    sys.exit(main())
