"""Draw the ratios of a file that ``fivefold-kernels bench --json`` wrote.

python plot.py results.json -o results.svg
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

# Bars of one contender have one colour in all plots, in the order of their first appearance here.
_COLORS = {"eager": "#8c8c8c", "compile": "#d98c00"}
_MORE_COLORS = ("#1f77b4", "#2ca02c", "#9467bd", "#8c564b", "#17becf", "#e377c2")
_BAR_INCHES = 0.18
SCHEMA = 1

# Case's label, and the ratio of each contender.
Row = tuple[str, dict[str, float]]


def main() -> int:
    """Run the command line; 1 where the file has nothing to draw or is of another schema."""
    parser = argparse.ArgumentParser(description="Draw the ratios of a benchmark.")
    parser.add_argument("results", type=Path, metavar="FILE.json")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.svg|png")
    parser.add_argument(
        "--clock",
        choices=("cpu", "wall", "gpu", "graph"),
        help="of the ratios, where a case has it (default: the one it says to read first)",
    )
    options = parser.parse_args()
    try:
        draw(json.loads(options.results.read_text()), options.output, options.clock)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"plot.py: error: {error}\n")
        return 1
    return 0


def draw(content: dict[str, Any], output: Path, clock: str | None = None) -> None:
    """Write a bar chart whose format the output's ending says.

    Args:
        content: of the benchmark's file.
        output: ends in .svg, .png or another format that matplotlib knows.
        clock: of the ratios; see ``ratios``.

    Raises:
        ValueError: another schema, no ratios, or an ending that matplotlib does not know.
    """
    rows = ratios(content, clock)
    import matplotlib

    matplotlib.use("Agg")
    # The same file for the same figures, so that a redrawn plot is no change.
    matplotlib.rcParams["svg.hashsalt"] = "fivefold-kernels"
    from matplotlib import pyplot

    bars = sum(len(found) + 1 for _, found in rows)
    figure, axes = pyplot.subplots(figsize=(9, 1.4 + _BAR_INCHES * bars), layout="constrained")
    _bars(axes, rows)
    axes.set_title(_title(content["machine"], content["versions"]), fontsize=9, loc="left")
    metadata = {"Date": None} if output.suffix == ".svg" else None
    figure.savefig(output, dpi=150, metadata=metadata)
    pyplot.close(figure)


def ratios(content: dict[str, Any], clock: str | None = None) -> list[Row]:
    """Cases with the time of each contender over the time of ours.

    Args:
        content: of the benchmark's file.
        clock: which times; those of the case's basis where it has no others.

    Raises:
        ValueError: another schema, or nothing to compare.
    """
    if content.get("schema") != SCHEMA:
        raise ValueError(f"drawn is schema {SCHEMA}, the file has {content.get('schema')}")
    rows = []
    for case in content["cases"]:
        found = {}
        for result in case["results"][1:]:
            summary = result["summary"]
            ratio = summary.get(clock, summary.get(case["basis"], {})).get("ratio")
            if ratio is not None:
                found[result["name"]] = ratio
        if found:
            label = f"{case['op']} {case['sample']}\n{case['dtype']} {case['phase']}"
            rows.append((label, found))
    if not rows:
        raise ValueError("no case of the file has a contender beside ours")
    return rows


def _bars(axes: Any, rows: list[Row]) -> None:
    names = list(dict.fromkeys(name for _, found in rows for name in found))
    palette = iter(_MORE_COLORS * len(names))
    colors = {name: _COLORS.get(name) or next(palette) for name in names}
    at, ticks = 0, []
    for _, found in rows:
        ticks.append(at + (len(found) - 1) / 2)
        for name, ratio in found.items():
            axes.barh(at, ratio, color=colors[name], height=0.9)
            axes.annotate(f" {ratio:.2f}", (ratio, at), va="center", fontsize=6)
            at += 1
        at += 1
    axes.set_yticks(ticks, [label for label, _ in rows], fontsize=6)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("time over the time of ours (right of the line, ours is faster)", fontsize=8)
    handles = [axes.barh(0, 0, color=colors[name], label=name) for name in names]
    axes.legend(handles=handles, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))


def _title(machine: dict[str, Any], versions: dict[str, str]) -> str:
    device = f"{machine['device_name']}, torch {versions.get('torch')}"
    if machine["device"] == "cpu":
        return f"{device}, threads: {machine['threads']}. A CPU: this says nothing of a GPU."
    return device


if __name__ == "__main__":
    sys.exit(main())
