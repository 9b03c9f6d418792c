"""The results as a table for people and as JSON lines for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ep_kernels.bench.workload import MEMCPY


@dataclass(frozen=True, kw_only=True)
class Line:
    """One operation of one contender.

    Attributes:
        op, contender, detail: what was timed.
        median_s, p95_s: seconds of the slowest rank, over the iterations.
        gb_per_s: bytes that all ranks must read and write, over the median.
        floor_s: the same bytes at the memcpy rate.
        floor_ratio: floor_s / median_s; 1 = as fast as copying.
        speedup: of ep_kernels over this contender, by the medians; None if it did not run.
    """

    op: str
    contender: str
    detail: str
    median_s: float
    p95_s: float
    gb_per_s: float
    floor_s: float
    floor_ratio: float
    speedup: float | None


def make_lines(results: dict[str, Any]) -> list[Line]:
    """Lines by operation, then contender, from what worker.py wrote."""
    num_bytes = results["num_bytes"]
    medians = {(row["op"], row["contender"]): row["median"] for row in results["rows"]}
    seconds_per_byte = medians[MEMCPY, MEMCPY] / num_bytes[MEMCPY]
    lines = []
    for row in results["rows"]:
        op, median = row["op"], row["median"]
        floor = num_bytes[op] * seconds_per_byte
        ours = medians.get((op, "ep_kernels"))
        lines.append(
            Line(
                op=op,
                contender=row["contender"],
                detail=row["detail"],
                median_s=median,
                p95_s=row["p95"],
                gb_per_s=num_bytes[op] / median * 1e-9,
                floor_s=floor,
                floor_ratio=floor / median,
                speedup=median / ours if ours else None,
            )
        )
    order = list(dict.fromkeys(line.op for line in lines))
    return sorted(lines, key=lambda line: order.index(line.op))


def format_table(lines: list[Line]) -> str:
    header = ("operation", "by", "median ms", "p95 ms", "GB/s", "of memcpy", "ep_kernels is")
    rows = [header, *(_cells(line) for line in lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    text = []
    for number, row in enumerate(rows):
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        text.append("  ".join(cells).rstrip())
        if number == 0:
            text.append("-" * (sum(widths) + 2 * (len(widths) - 1)))
        elif number + 1 < len(rows) and rows[number + 1][0] != row[0]:
            text.append("")
    return "\n".join(text)


def json_lines(results: dict[str, Any], lines: list[Line]) -> Iterator[str]:
    """One JSON object per line of the table; times in microseconds."""
    common = {key: results[key] for key in ("version", "torch", "machine", "num_iterations")}
    for line in lines:
        yield json.dumps(
            {
                "op": line.op,
                "contender": line.contender,
                "detail": line.detail,
                "median_us": round(line.median_s * 1e6, 1),
                "p95_us": round(line.p95_s * 1e6, 1),
                "gb_per_s": round(line.gb_per_s, 3),
                "floor_us": round(line.floor_s * 1e6, 1),
                "floor_ratio": round(line.floor_ratio, 4),
                "ep_kernels_speedup": None if line.speedup is None else round(line.speedup, 3),
                **common,
                **results["workload"],
            }
        )


def _cells(line: Line) -> tuple[str, ...]:
    is_ours = line.contender in {"ep_kernels", MEMCPY}
    speedup = "" if is_ours or line.speedup is None else f"{line.speedup:.2f}x faster"
    return (
        line.op,
        f"{line.contender}, {line.detail}",
        f"{line.median_s * 1e3:.3f}",
        f"{line.p95_s * 1e3:.3f}",
        f"{line.gb_per_s:.2f}",
        f"{line.floor_ratio:.2f}",
        speedup,
    )
