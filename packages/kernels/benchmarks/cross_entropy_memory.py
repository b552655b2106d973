"""Peak memory and time of the losses at 131,072 classes on a CPU, beside torch's; writes a JSON.

Every contender runs forward and backward in a fresh process, which says how far its resident
memory rose above what it was when the inputs were there. Takes about half a minute; Linux only.

    python benchmarks/cross_entropy_memory.py [--tokens 512] [--classes 131072] [--features 64]
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fivefold.kernels.ops.cross_entropy import cross_entropy
from fivefold.kernels.ops.linear_cross_entropy import linear_cross_entropy

RESULT = Path(__file__).with_suffix(".json")
THREADS = (1, 2)
# Inputs, their dtype, and torch's loss and ours of them; a pair is compared by its ratio.
PAIRS = {
    "linear, float32": ("linear", torch.float32),
    "linear, bfloat16": ("linear", torch.bfloat16),
    "float32 logits for torch, bfloat16 for ours": ("logits", None),
    "bfloat16 logits": ("logits", torch.bfloat16),
}
Step = Callable[[], None]


def main() -> None:
    """Run every contender, print and write what they took."""
    options = _options()
    if options.contender:
        sys.stdout.write(json.dumps(_measure(options)))
        return
    record = {"machine": _machine(), "sizes": _sizes(options), "pairs": []}
    for pair in PAIRS:
        torchs, ours = (_in_child(options, pair, who) for who in ("torch", "fivefold"))
        entry = {"pair": pair, "torch": torchs, "fivefold": ours}
        entry["peak_ratio"] = round(ours["peak_bytes"] / torchs["peak_bytes"], 3)
        entry["seconds_ratio"] = {
            n: round(ours["seconds"][n] / torchs["seconds"][n], 3) for n in torchs["seconds"]
        }
        record["pairs"].append(entry)
        sys.stdout.write(_line(entry))
    _write(record)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--classes", type=int, default=131072)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--pair", help=argparse.SUPPRESS)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_child(options: argparse.Namespace, pair: str, who: str) -> dict[str, Any]:
    sizes = [f"--{name}={value}" for name, value in _sizes(options).items()]
    command = [sys.executable, __file__, *sizes, f"--pair={pair}", f"--contender={who}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    # What is loaded, compiled or started once is there before anything is measured.
    _steps(options.pair, options.contender, 4, 64, 8)()
    step = _steps(options.pair, options.contender, *_sizes(options).values())
    before = _status("VmHWM")
    torch.set_num_threads(THREADS[-1])
    step()
    peak = _status("VmHWM") - before
    return {"peak_bytes": peak, "seconds": {str(n): _seconds(step, n) for n in THREADS}}


def _steps(pair: str, who: str, tokens: int, classes: int, features: int) -> Step:
    """Forward and backward of one contender; gradients of the step before are freed."""
    kind, dtype = PAIRS[pair]
    dtype = dtype or (torch.float32 if who == "torch" else torch.bfloat16)
    torch.manual_seed(0)
    target = torch.randint(0, classes, (tokens,))
    if kind == "logits":
        inputs = [_normal(tokens, classes, dtype, 1.0)]
        losses = {"torch": _torch_logits, "fivefold": cross_entropy}
    else:
        inputs = [_normal(tokens, features, dtype, 1.0)]
        inputs.append(_normal(classes, features, dtype, features**-0.5))
        losses = {"torch": _torch_linear, "fivefold": linear_cross_entropy}

    def step() -> None:
        for each in inputs:
            each.grad = None
        losses[who](*inputs, target).backward()

    return step


def _torch_logits(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), target)


def _torch_linear(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), target)


def _normal(rows: int, columns: int, dtype: torch.dtype, scale: float) -> Tensor:
    # In place: a copy would raise the mark that the peak is measured from.
    return torch.empty(rows, columns, dtype=dtype).normal_(0, scale).requires_grad_()


def _seconds(step: Step, threads: int) -> float:
    torch.set_num_threads(threads)
    found = []
    for _ in range(2):
        start = time.perf_counter()
        step()
        found.append(time.perf_counter() - start)
    return round(min(found), 4)


def _status(name: str) -> int:
    """Bytes that the kernel has written down about this process."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(rf"{name}:\s+(\d+) kB", text)[0])


def _sizes(options: argparse.Namespace) -> dict[str, int]:
    return {name: getattr(options, name) for name in ("tokens", "classes", "features")}


def _machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text()
    return {
        "cpu": re.findall(r"model name\s*:\s*(.*)", info)[:1],
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def _line(entry: dict[str, Any]) -> str:
    mib = [entry[who]["peak_bytes"] / 2**20 for who in ("torch", "fivefold")]
    times = ", ".join(f"{n}: {ratio}" for n, ratio in entry["seconds_ratio"].items())
    return (
        f"{entry['pair']}: peak {mib[1]:.0f} MiB beside {mib[0]:.0f} "
        f"(x {entry['peak_ratio']}), time by threads x {{{times}}}\n"
    )


def _write(record: dict[str, Any]) -> None:
    scratch = RESULT.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(scratch, RESULT)


if __name__ == "__main__":
    main()
