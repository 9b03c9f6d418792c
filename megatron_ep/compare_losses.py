"""Compares the losses of training runs, step by step.

python -m megatron_ep.compare_losses runs/alltoall runs/deepep
... --within 1e-3     exit status 1 unless all losses are that close to the first run's, relatively

Prints a table, and a line of JSON for each run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median

from megatron_ep.metrics import read_metrics

NUM_ROWS = 10


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The losses of a run, by step.

    Attributes:
        step_time_ms: median, of the reports.
    """

    name: str
    losses: dict[int, float]
    step_time_ms: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Of a run with the first one, over the steps of both.

    Attributes:
        largest: the largest relative difference.
        at_end: of the means over the last tenth of the steps, relative, with its sign.
    """

    name: str
    num_steps: int
    last_loss: float
    largest: float
    at_end: float
    step_time_ms: float


def read_curve(path: str | Path) -> Curve:
    """Of a metrics file, or of the metrics.jsonl in a directory.

    Raises:
        OSError: there is none.
        ValueError: it has no training losses.
    """
    path = Path(path)
    file = path / "metrics.jsonl" if path.is_dir() else path
    lines = [line for line in read_metrics(file) if line["kind"] == "train" and "loss" in line]
    if not lines:
        raise ValueError(f"{file} has no training losses")
    return Curve(
        name=file.resolve().parent.name,
        losses={line["iteration"]: line["loss"] for line in lines},
        step_time_ms=median(line["step_time_ms"] for line in lines),
    )


def compare(first: Curve, other: Curve) -> Comparison:
    """Raises ValueError if they have no step in common."""
    steps = sorted(first.losses.keys() & other.losses.keys())
    if not steps:
        raise ValueError(f"{first.name} and {other.name} have no step in common")
    last_tenth = steps[-max(1, len(steps) // 10) :]
    end, other_end = (fmean(c.losses[step] for step in last_tenth) for c in (first, other))
    differences = [abs(other.losses[step] / first.losses[step] - 1) for step in steps]
    return Comparison(
        name=other.name,
        num_steps=len(steps),
        last_loss=other.losses[steps[-1]],
        largest=max(differences),
        at_end=other_end / end - 1,
        step_time_ms=other.step_time_ms,
    )


def report(curves: Sequence[Curve], comparisons: Sequence[Comparison]) -> str:
    """The table: some steps of every run, and what follows from all of them."""
    steps = sorted(set.intersection(*(set(curve.losses) for curve in curves)))
    stride = max(1, len(steps) // NUM_ROWS)
    shown = sorted({*steps[:1], *steps[stride - 1 :: stride]})
    width = max(12, *(len(curve.name) + 2 for curve in curves))
    rows = [("step", [curve.name for curve in curves])]
    rows += [(str(step), [f"{curve.losses[step]:.6f}" for curve in curves]) for step in shown]
    rows += [
        ("largest", [f"{one.largest:.2e}" for one in comparisons]),
        ("at end", [f"{one.at_end:+.2e}" for one in comparisons]),
        ("ms/step", [f"{one.step_time_ms:.1f}" for one in comparisons]),
    ]
    lines = [f"{name:8}" + "".join(f"{cell:>{width}}" for cell in cells) for name, cells in rows]
    return "\n".join([*lines, *(json.dumps(asdict(one)) for one in comparisons)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_ep.compare_losses",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory or metrics file")
    parser.add_argument("--within", type=float, metavar="BOUND", help="relative; default: none")
    options = parser.parse_args(arguments)
    try:
        curves = [read_curve(path) for path in options.runs]
        comparisons = [compare(curves[0], curve) for curve in curves]
    except (OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(report(curves, comparisons) + "\n")
    too_far = [
        one.name for one in comparisons if options.within and not one.largest <= options.within
    ]
    if too_far:
        sys.stderr.write(f"not within {options.within:g}: {', '.join(too_far)}\n")
    return int(bool(too_far))


if __name__ == "__main__":
    sys.exit(main())
