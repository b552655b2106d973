"""The law of equality under every layout of 8 ranks: too long for each run of the tests.

    cd packages/moe && python -m tests.every_layout --output benchmarks/layouts.json

trains the model of ``law`` under each legal layout in the default order and prints, for each, the
largest relative distance from plain torch in one process. It ends with 1 where one is 1e-12 or
more, of the parameters after three steps of Adam 1e-11.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout

from .law import BATCH, Case, Record, judge, plain_run, with_model

WORLD = 8
# As many heads as the largest tp, and layers as the largest pp.
MODEL = with_model(num_attention_heads=8, head_dim=4, num_key_value_heads=4, num_layers=8)
DEGREES = ("tp", "cp", "pp", "ep", "etp")


def cases() -> Iterator[Case]:
    """Every legal layout; expert width and sequence divide by all degrees."""
    for layout in Layout.legal(WORLD):
        degrees = tuple((name, getattr(layout, name)) for name in DEGREES)
        most = BATCH // layout.dp
        model = replace(MODEL, num_layers=max(2, layout.pp))
        size = min(2, most) if layout.pp == 1 else max(1, most // layout.pp)
        yield Case(degrees=degrees, model=model, microbatch_size=size)


def worst(case: Case, expected: Record) -> dict[str, float]:
    """The largest distance of each kind over all ranks."""
    found: dict[str, float] = defaultdict(float)
    for verdict in launch(judge, WORLD, case, expected, timeout=300):
        for what, distance in verdict.distances.items():
            kind = what.partition("[")[0]
            kind = kind if kind in ("gradients", "parameters") else "scalars"
            found[kind] = max(found[kind], distance)
    return dict(found)


def main() -> int:
    """Run all, print and write; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    references: dict[int, Record] = {}
    rows, status = [], 0
    for case in cases():
        layers = case.model.num_layers
        if layers not in references:
            references[layers] = plain_run(case.model)
        found = worst(case, references[layers])
        wrong = any(d >= (1e-11 if kind == "parameters" else 1e-12) for kind, d in found.items())
        status |= int(wrong)
        rows.append({**dict(case.degrees), "worst": found})
        figures = ", ".join(f"{kind} {distance:.1e}" for kind, distance in found.items())
        print(f"{case}: {figures}{' WRONG' if wrong else ''}", flush=True)
    print(f"{len(rows)} layouts, {'some are wrong' if status else 'all equal'}")
    if options.output:
        figures = {"torch": version("torch"), "world": WORLD, "rows": rows}
        options.output.write_text(json.dumps(figures, indent=1) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
