"""Time of an epoch of sleeping samples, 2 % of them fifty times slower, by loader.

Ideal is all sleep divided by the workers. Run: ``python benchmarks/loader.py --json OUT``.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from fivefold.parallel_core.loader import ReadyFirstLoader

SLOW_SHARE, SLOW_TIMES = 0.02, 50


class Sleeping(Dataset[int]):
    """Samples that take a time and no processor."""

    def __init__(self, num_samples: int, seconds: float, seed: int):
        rng = random.Random(seed)
        slow = set(rng.sample(range(num_samples), round(SLOW_SHARE * num_samples)))
        self.seconds = [seconds * (SLOW_TIMES if n in slow else 1) for n in range(num_samples)]

    def __len__(self) -> int:
        return len(self.seconds)

    def __getitem__(self, number: int) -> int:
        time.sleep(self.seconds[number])
        return number


def _numbers(data: Sleeping, kind: str, num_workers: int) -> Iterator[int]:
    if kind == "ready first":
        for each in ReadyFirstLoader(data, len(data), num_workers=num_workers):
            yield each.value
        return
    in_order = kind == "torch in order"
    torchs = DataLoader(data, batch_size=None, num_workers=num_workers, in_order=in_order)
    yield from (int(each) for each in torchs)


def measure(data: Sleeping, kind: str, num_workers: int) -> dict[str, float]:
    """One epoch: its time over the ideal, and the greatest displacement.

    Raises:
        RuntimeError: a sample was lost or came twice.
    """
    start = time.perf_counter()
    found = list(_numbers(data, kind, num_workers))
    seconds = time.perf_counter() - start
    if sorted(found) != list(range(len(data))):
        raise RuntimeError(f"{kind}: {len(found)} samples of {len(data)}, or some of them twice")
    return {
        "over_ideal": round(seconds / (sum(data.seconds) / num_workers), 3),
        "displacement": max(abs(place - number) for place, number in enumerate(found)),
    }


def main() -> None:
    """Measure all loaders with all numbers of workers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--num-samples", type=int, default=400, help="for each worker")
    parser.add_argument("--seconds", type=float, default=0.01, help="of a sample that is not slow")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "samples_per_worker": options.num_samples,
        "seconds": options.seconds,
        "slow_share": SLOW_SHARE,
        "slow_times": SLOW_TIMES,
    }
    for num_workers in (4, 14):
        data = Sleeping(options.num_samples * num_workers, options.seconds, seed=num_workers)
        for kind in ("ready first", "torch in order", "torch in_order=False"):
            found = measure(data, kind, num_workers)
            result[f"{kind}, {num_workers} workers"] = found
            print(num_workers, kind, found, flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
