"""Draws the JSON lines of benchmarks on GPUs.

python -m ep_kernels.bench.plot results.jsonl times.png

Times over the SMs that a rank uses, or over the tokens where those vary; dashed: their floor.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def read_records(paths: Sequence[str | Path]) -> list[Record]:
    """The lines of the files that have a time; a last line that is cut off is left out."""
    records = []
    for path in paths:
        for line in Path(path).read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict) and "p50_us" in record:
                records.append(record)
    return records


def load_pyplot(paths: Sequence[str | Path]) -> Any:
    """matplotlib.pyplot, for pictures in files. Raises ImportError that names `paths`, the numbers
    that were to be drawn.
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError(
            "plots need the package matplotlib: pip install matplotlib; the numbers are in "
            f"{', '.join(map(str, paths))}"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot_times(paths: Sequence[str | Path], output: str | Path) -> Path:
    """Writes a picture with a panel for each operation; its suffix is the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the files have no times.
    """
    plt = load_pyplot(paths)
    records = read_records(paths)
    if not records:
        raise ValueError(f"{', '.join(map(str, paths))}: no times")
    ops = list(dict.fromkeys(_panel_of(record) for record in records))
    figure, axes = plt.subplots(
        1, len(ops), figsize=(6 * len(ops), 5), squeeze=False, layout="constrained"
    )
    for axis, op in zip(axes[0], ops, strict=True):
        _draw_panel(axis, [record for record in records if _panel_of(record) == op])
        axis.set_title(op)
    figure.suptitle(_title(records))
    figure.savefig(output, dpi=120)
    plt.close(figure)
    return Path(output)


def x_name(records: list[Record]) -> str:
    """What varies: "num_tokens" or "num_sms"."""
    num_tokens = {record.get("num_tokens") for record in records}
    return "num_tokens" if len(num_tokens) > 1 else "num_sms"


def _draw_panel(axis: Any, records: list[Record]) -> None:
    name = x_name(records)
    labels = list(dict.fromkeys(_label(record) for record in records))
    for number, label in enumerate(labels):
        points = [record for record in records if _label(record) == label]
        color = f"C{number % 10}"
        if any(record.get(name) is None for record in points):  # the same whatever our SMs
            for record in points:
                axis.axhline(record["p50_us"], color=color, ls=":", label=label)
            continue
        points.sort(key=lambda record: record[name])
        xs = [record[name] for record in points]
        axis.plot(xs, [record["p50_us"] for record in points], "o-", color=color, label=label)
        floors = [record.get("floor_us") for record in points]
        if all(floor is not None for floor in floors):
            axis.plot(xs, floors, "--", color=color, lw=1)
    if name == "num_tokens":
        axis.set_xscale("log", base=2)
    axis.set_xlabel({"num_sms": "SMs per rank", "num_tokens": "tokens per rank"}[name])
    axis.set_ylabel("us (dashed: floor)")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")


def _panel_of(record: Record) -> str:
    words = [str(record[key]) for key in ("op", "layout") if record.get(key)]
    return " ".join(words) or "times"


def _label(record: Record) -> str:
    keys = ("by", "rows", "routing", "clock")
    return ", ".join(str(record[key]) for key in keys if record.get(key))


def _title(records: list[Record]) -> str:
    first = records[0]
    parts = [str(first.get("device", ""))]
    if "num_ranks" in first:
        parts.append(f"{first['num_ranks']} ranks on {first.get('num_gpus', '?')} GPU(s)")
    if "hidden" in first:
        parts.append(f"hidden {first['hidden']}")
    return ", ".join(part for part in parts if part)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ep_kernels.bench.plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="+", help="JSON lines that a benchmark wrote")
    parser.add_argument("output", help="picture to write")
    options = parser.parse_args(arguments)
    try:
        print(plot_times(options.results, options.output))
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
