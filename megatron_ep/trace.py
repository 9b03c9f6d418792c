"""A timeline of transfers and experts on CPU ranks, and how much of the transfers experts hide.

    tracer = start_tracing()              before the model is built
    with tracer.recording(): ...          the steps of interest
    write_trace(path, group spans)        for Perfetto or chrome://tracing

A rank has two tracks: "experts", and "transfers" for dispatch and combine. A transfer that the
caller does not wait for is drawn where it ran on the buffer's thread; the exchange of counts before
it, for which every fresh dispatch waits, is drawn apart as "notify".
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

EXPERTS, TRANSFERS = "experts", "transfers"

_active: Tracer | None = None


@dataclass(frozen=True)
class Span:
    """Something that took time on this rank; nanoseconds of time.monotonic_ns()."""

    track: str
    name: str
    begin_ns: int
    end_ns: int


@dataclass(frozen=True)
class _Call:
    """A transfer whose event may be under way."""

    name: str
    event: Any
    begin_ns: int
    end_ns: int
    is_fresh: bool


class Tracer:
    """Collects the spans of this rank while recording."""

    def __init__(self) -> None:
        self._is_recording = False
        self._spans: list[Span] = []
        self._under_way: list[_Call] = []
        self._begins: list[int] = []

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Records inside of the block."""
        self._is_recording = True
        try:
            yield
        finally:
            self._is_recording = False

    def spans(self) -> list[Span]:
        """All spans so far; waits for transfers under way."""
        for call in self._under_way:
            on_caller, elsewhere = (call.begin_ns, call.end_ns), call.event.interval()
            if elsewhere is not None and call.is_fresh:
                self._spans.append(Span(TRANSFERS, "notify", *on_caller))
            self._spans.append(Span(TRANSFERS, call.name, *(elsewhere or on_caller)))
        self._under_way.clear()
        return self._spans

    def trace_transfer(self, name: str, call: Callable[[], Any], *, is_fresh: bool = False) -> Any:
        """Makes a call of a buffer, whose result has an event; a fresh dispatch has a notify."""
        begin_ns = time.monotonic_ns()
        result = call()
        if self._is_recording:
            end_ns = time.monotonic_ns()
            self._under_way.append(_Call(name, result.event, begin_ns, end_ns, is_fresh))
        return result

    def watch_experts(self, experts: torch.nn.Module) -> None:
        """Records forwards and backwards of a module."""

        def begin(*_: Any) -> None:
            self._begins.append(time.monotonic_ns())

        def end(name: str) -> Callable[..., None]:
            def record(*_: Any) -> None:
                begin_ns = self._begins.pop() if self._begins else time.monotonic_ns()
                if self._is_recording:
                    self._spans.append(Span(EXPERTS, name, begin_ns, time.monotonic_ns()))

            return record

        experts.register_forward_pre_hook(begin)
        experts.register_forward_hook(end("forward"))
        experts.register_full_backward_pre_hook(begin)
        experts.register_full_backward_hook(end("backward"))


class TracedBuffer:
    """A buffer whose dispatches and combines are recorded."""

    def __init__(self, buffer: Any, tracer: Tracer) -> None:
        self._buffer, self._tracer = buffer, tracer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._buffer, name)

    def dispatch(self, *arguments: Any, **options: Any) -> Any:
        return self._tracer.trace_transfer(
            "dispatch",
            lambda: self._buffer.dispatch(*arguments, **options),
            is_fresh=options.get("handle") is None,
        )

    def combine(self, *arguments: Any, **options: Any) -> Any:
        return self._tracer.trace_transfer(
            "combine", lambda: self._buffer.combine(*arguments, **options)
        )


def start_tracing() -> Tracer:
    """Layers and buffers made from now on are traced; ends any earlier tracing.

    Raises:
        ValueError: the ranks have GPUs, whose timeline torch.profiler shows.
    """
    global _active
    if torch.cuda.is_available():
        raise ValueError("the timeline is for CPU ranks; for GPUs use torch.profiler or nsys")
    _active = Tracer()
    return _active


def stop_tracing() -> None:
    """Layers and buffers made from now on are not traced."""
    global _active
    _active = None


def active_tracer() -> Tracer | None:
    """The tracer of start_tracing()."""
    return _active


def hidden_fraction(spans: Sequence[Span]) -> float | None:
    """The part of the transfers' time during which experts of the same rank compute.

    Example: a transfer from 0 to 10 and experts from 4 to 20 -> 0.6. None without transfers.
    """
    busy = _merge([(span.begin_ns, span.end_ns) for span in spans if span.track == EXPERTS])
    transfers = _merge([(span.begin_ns, span.end_ns) for span in spans if span.track == TRANSFERS])
    total = sum(end - begin for begin, end in transfers)
    hidden = sum(
        max(0, min(end, busy_end) - max(begin, busy_begin))
        for begin, end in transfers
        for busy_begin, busy_end in busy
    )
    return hidden / total if total else None


def _merge(intervals: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Disjoint intervals that cover the same times."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged


def write_trace(path: str | Path, spans_of_ranks: Sequence[Sequence[Span]]) -> None:
    """Writes Chrome's trace event format: a process per rank, a thread per track.

    Args:
        path: of the JSON file.
        spans_of_ranks: of ranks of one machine, which share the clock.
    """
    begins = [span.begin_ns for spans in spans_of_ranks for span in spans]
    origin = min(begins, default=0)
    events: list[dict[str, Any]] = []
    for rank, spans in enumerate(spans_of_ranks):
        events.append(_name("process_name", f"rank {rank}", pid=rank))
        for tid, track in enumerate((EXPERTS, TRANSFERS)):
            events.append(_name("thread_name", track, pid=rank, tid=tid))
            events += [
                {
                    "ph": "X",
                    "name": span.name,
                    "pid": rank,
                    "tid": tid,
                    "ts": (span.begin_ns - origin) / 1e3,
                    "dur": (span.end_ns - span.begin_ns) / 1e3,
                }
                for span in spans
                if span.track == track
            ]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def _name(kind: str, name: str, **ids: int) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "args": {"name": name}, **ids}
