"""Draws the loss curves of metrics files.

python -m megatron_ep.plot runs/quickstart/metrics.jsonl --output loss.png
python -m megatron_ep.plot a/metrics.jsonl b/metrics.jsonl --label deepep alltoall
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ep_kernels.bench.plot import load_pyplot
from megatron_ep.metrics import read_metrics


def plot_losses(
    paths: Sequence[str | Path], output: str | Path, *, labels: Sequence[str] | None = None
) -> Path:
    """Writes a picture: training and validation loss and, where there are experts, their balance.

    Args:
        paths: metrics files.
        output: the picture; its suffix (.png, .svg, .pdf) is the format.
        labels: names of the curves; those of the directories if not given.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a file has no losses, or the number of labels differs from that of files.
    """
    plt = load_pyplot(paths)
    names = list(labels) if labels else [Path(path).resolve().parent.name for path in paths]
    if len(names) != len(paths):
        raise ValueError(f"{len(names)} labels for {len(paths)} files")
    runs = [read_metrics(path) for path in paths]
    for path, records in zip(paths, runs):
        if not _series(records, "train", "loss")[0]:
            raise ValueError(f"{path} has no training losses")
    has_experts = any(_series(r, "train", "expert_load_max_over_mean")[0] for r in runs)
    figure, axes = plt.subplots(
        2 if has_experts else 1, 1, figsize=(7, 6 if has_experts else 4), sharex=True, squeeze=False
    )
    for i, (name, records) in enumerate(zip(names, runs)):
        _draw_run(axes[:, 0], records, name, color=f"C{i}")
    axes[0, 0].set_ylabel("loss (nats per token)")
    axes[-1, 0].set_xlabel("step")
    if has_experts:
        axes[1, 0].set_ylabel("busiest expert / mean")
    for axis in axes[:, 0]:
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(output, dpi=120)
    plt.close(figure)
    return Path(output)


def _draw_run(axes: Any, records: list[dict[str, Any]], name: str, *, color: str) -> None:
    axes[0].plot(*_series(records, "train", "loss"), color=color, lw=1, label=f"{name}: training")
    steps, losses = _series(records, "eval", "loss")
    if steps:
        axes[0].plot(steps, losses, "o--", color=color, ms=4, lw=1, label=f"{name}: validation")
    if len(axes) > 1:
        axes[1].plot(
            *_series(records, "train", "expert_load_max_over_mean"), color=color, lw=1, label=name
        )


def _series(records: list[dict[str, Any]], kind: str, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the records that have the key."""
    chosen = [record for record in records if record["kind"] == kind and key in record]
    return [record["iteration"] for record in chosen], [record[key] for record in chosen]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_ep.plot", description="Draws the loss curves of metrics files."
    )
    parser.add_argument("metrics", nargs="+", help="metrics.jsonl files")
    parser.add_argument("--output", default="loss.png", help="picture to write (%(default)s)")
    parser.add_argument("--label", nargs="+", help="names of the curves")
    options = parser.parse_args(arguments)
    try:
        path = plot_losses(options.metrics, options.output, labels=options.label)
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    print(path)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
