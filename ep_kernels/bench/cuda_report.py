"""What the ranks measured, as it comes: a table on the terminal, JSON lines in a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from ep_kernels.bench.cuda_floors import Floor, Rates, RowCounts, floor_of
from ep_kernels.bench.cuda_ops import CACHED, Op
from ep_kernels.bench.cuda_timing import Timing

COLUMNS = (
    ("operation", -43),
    ("by", -24),
    ("SMs", 4),
    ("p50 us", 9),
    ("p95 us", 9),
    ("clock", -6),
    ("the other", 9),
    ("floor us", 9),
    ("of", -6),
    ("x floor", 7),
    ("GB/s across", 11),
)


def _call_nothing() -> None:
    """In place of what was timed."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One operation, as timed."""

    op: Op
    timing: Timing
    floor: Floor

    @property
    def ratio(self) -> float:
        """Time by the operation's clock over the floor."""
        return _ratio(getattr(self.timing, self.op.clock).median, self.floor.seconds)

    def as_dict(self) -> dict[str, Any]:
        """Of what goes into a JSON line; times in microseconds."""
        op, stats = self.op, getattr(self.timing, self.op.clock)
        times = {"p50": stats.median, "p95": stats.p95, "min": stats.minimum}
        for clock in ("events", "host"):
            by_clock = getattr(self.timing, clock)
            times |= {f"{clock}_p50": by_clock.median, f"{clock}_p95": by_clock.p95}
        times |= {
            "floor": self.floor.seconds,
            "memory_floor": self.floor.memory_s,
            "link_floor": self.floor.link_s,
        }
        names = ("op", "layout", "rows", "routing", "by", "num_sms", "clock")
        return {
            **{name: getattr(op, name) for name in names},
            **{f"{name}_us": round(seconds * 1e6, 2) for name, seconds in times.items()},
            "floor_limit": self.floor.limit,
            "ratio": round(self.ratio, 4),
            "link_gb_per_s": round(self.floor.link_bytes / stats.median * 1e-9, 2),
        }

    def cells(self) -> tuple[str, ...]:
        op, is_events = self.op, self.op.clock == "events"
        stats = getattr(self.timing, op.clock)
        other = self.timing.host if is_events else self.timing.events
        across = self.floor.link_bytes / stats.median * 1e-9
        return (
            f"{op.op} {op.layout} {op.rows}, {op.routing}",
            op.by,
            str(op.num_sms or ""),
            f"{stats.median * 1e6:.1f}",
            f"{stats.p95 * 1e6:.1f}",
            op.clock,
            f"{other.median * 1e6:.1f}",
            f"{self.floor.seconds * 1e6:.1f}",
            self.floor.limit,
            f"{self.ratio:.2f}",
            f"{across:.1f}" if self.floor.link_bytes else "",
        )


@dataclass(kw_only=True)
class Report:
    """Writes results as they come, so that those of a run that is cut off remain.

    Attributes:
        is_writer: whether this rank prints and writes; the others only keep.
        path: of the JSON lines, which are appended; "-" for the output, None for none.
        common: in every JSON line.
        counts, num_gpus, rates: what floors are made of.
    """

    is_writer: bool
    path: str | None
    common: dict[str, Any]
    counts: RowCounts
    num_gpus: int
    rates: Rates
    lines: list[Line] = field(default_factory=list)

    def start(self, link_way: str) -> None:
        """The rates, and the head of the table."""
        memory, link = self.rates.memory * 1e-9, (self.rates.link or 0.0) * 1e-9
        text = f"copies by all ranks at once: {memory:.0f} GB/s read + written per GPU"
        if link:
            text += f"; {link:.1f} GB/s from each GPU {link_way}"
        self._print(f"{text}\n\n{format_row([name for name, _ in COLUMNS])}")
        rates = {"memory_gb_per_s": round(memory, 2), "link_gb_per_s": round(link, 2) or None}
        self._write({"op": "copy", "by": "copy", "link_way": link_way, **rates})

    def add(self, op: Op, timing: Timing) -> Line:
        floor = floor_of(
            op.op,
            op.layout,
            self.counts,
            num_gpus=self.num_gpus,
            row_bytes=op.row_bytes,
            rates=self.rates,
        )
        # NOTE: without what is called, which holds rows of the pool.
        line = Line(op=replace(op, call=_call_nothing), timing=timing, floor=floor)
        self.lines.append(line)
        self._print(format_row(line.cells()))
        self._write(line.as_dict())
        return line

    def note(self, text: str) -> None:
        self._print(text)

    def finish(self) -> None:
        """How the best of ours compares with the baseline's, by the host's clock."""
        for text in comparisons(self.lines):
            self._print(text)

    def _print(self, text: str) -> None:
        if self.is_writer:
            print(text, flush=True)

    def _write(self, fields: dict[str, Any]) -> None:
        if not self.is_writer or self.path is None:
            return
        text = json.dumps(fields | self.common)
        if self.path == "-":
            print(text, flush=True)
        else:
            with open(self.path, "a") as file:
                file.write(f"{text}\n")


def format_row(cells: list[str] | tuple[str, ...]) -> str:
    """One line of the table; a negative width aligns to the left."""
    text = [
        cell.ljust(-width) if width < 0 else cell.rjust(width)
        for cell, (_, width) in zip(cells, COLUMNS, strict=True)
    ]
    return "  ".join(text).rstrip()


def comparisons(lines: list[Line]) -> Iterator[str]:
    """A sentence for every line of a baseline that does what a line of ours does."""
    for line in lines:
        if line.op.by == "ep_kernels":
            continue
        same = [
            other
            for other in lines
            if other.op.by == "ep_kernels"
            and (other.op.op, other.op.layout, other.op.rows)
            == (line.op.op, line.op.layout, line.op.rows)
            and (other.op.routing == CACHED) == (line.op.routing == CACHED)
        ]
        if same:
            clock = line.op.clock
            ours = min(getattr(other.timing, clock).median for other in same)
            times = _ratio(getattr(line.timing, clock).median, ours)
            yield f"{line.op.op} {line.op.layout}: {times:.2f} times as fast as {line.op.by}"


def _ratio(value: float, reference: float) -> float:
    return value / reference if reference else 0.0
