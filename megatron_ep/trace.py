"""A timeline of transfers and experts, and how much of the transfers experts hide.

    tracer = start_tracing()              before the model is built
    with tracer.recording(): ...          the steps of interest
    write_trace(path, group spans)        for Perfetto or chrome://tracing

A rank has two tracks: "experts", and "transfers" for dispatch, combine and, of layers in chunks,
the exchange of their routings. On the CPU a transfer
that the caller does not wait for is drawn where it ran on the buffer's thread; the exchange of
counts before it, for which every fresh dispatch waits, is drawn apart as "notify". On a GPU a
transfer begins when the one before it is over and its input is there, and includes the exchange of
counts; experts are drawn from when their rows are there until their kernels are done.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ep.routing import ROUTING_BYTES
from megatron_ep.trace_clocks import Clock, DeviceClock, HostClock

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
class _Run:
    """Of the experts; moments of the clock."""

    name: str
    begin: Any
    end: Any


@dataclass(frozen=True)
class _Call:
    """A transfer, whose event may be under way; moments of the clock.

    Attributes:
        begin, end: of the call itself.
        over: when the transfer is; None if the event knows.
    """

    name: str
    event: Any
    begin: Any
    end: Any
    over: Any
    is_fresh: bool


class Tracer:
    """Collects the spans of this rank while recording.

    Args:
        clock: of the device where the rank works.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._is_recording = False
        self._spans: list[Span] = []
        self._calls: list[_Call] = []
        self._runs: list[_Run] = []
        self._begins: list[Any] = []
        self._last_end_ns = 0

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Records inside of the block."""
        self._clock.start()
        self._is_recording = True
        try:
            yield
        finally:
            self._is_recording = False

    def spans(self) -> list[Span]:
        """All spans so far; waits for what is under way."""
        read = self._clock.read
        for call in self._calls:
            self._spans += self._spans_of(call)
        for run in self._runs:
            self._spans.append(Span(EXPERTS, run.name, read(run.begin), read(run.end)))
        self._calls.clear()
        self._runs.clear()
        return self._spans

    def _spans_of(self, call: _Call) -> list[Span]:
        begin_ns = self._clock.read(call.begin)
        if call.over is not None:
            end_ns = self._clock.read(call.over)
            begin_ns = min(end_ns, max(begin_ns, self._last_end_ns))
            self._last_end_ns = end_ns
            return [Span(TRANSFERS, call.name, begin_ns, end_ns)]
        on_caller, elsewhere = (begin_ns, self._clock.read(call.end)), call.event.interval()
        spans = [Span(TRANSFERS, call.name, *(elsewhere or on_caller))]
        if elsewhere is not None and call.is_fresh:
            spans.insert(0, Span(TRANSFERS, "notify", *on_caller))
        return spans

    def trace_transfer(self, name: str, call: Callable[[], Any], *, is_fresh: bool = False) -> Any:
        """Makes a call of a buffer, whose result has an event; a fresh dispatch has a notify."""
        if not self._is_recording:
            return call()
        begin = self._clock.now()
        result = call()
        end, over = self._clock.now(), self._clock.after(result.event)
        self._calls.append(_Call(name, result.event, begin, end, over, is_fresh))
        return result

    @contextlib.contextmanager
    def computing(self, name: str) -> Iterator[None]:
        """Records what the block computes as work of the experts."""
        begin = self._clock.now() if self._is_recording else None
        yield
        if begin is not None:
            self._runs.append(_Run(name, begin, self._clock.now()))

    def watch_experts(self, experts: torch.nn.Module) -> None:
        """Records forwards and backwards of a module."""

        def begin(*_: Any) -> None:
            self._begins.append(self._clock.now() if self._is_recording else None)

        def end(name: str) -> Callable[..., None]:
            def record(*_: Any) -> None:
                began = self._begins.pop() if self._begins else None
                if self._is_recording:
                    now = self._clock.now()
                    self._runs.append(_Run(name, now if began is None else began, now))

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
        rows = arguments[0]
        is_routing = (
            isinstance(rows, torch.Tensor) and rows.shape[1] * rows.element_size() == ROUTING_BYTES
        )
        return self._tracer.trace_transfer(
            "routing" if is_routing else "dispatch",
            lambda: self._buffer.dispatch(*arguments, **options),
            is_fresh=options.get("handle") is None,
        )

    def combine(self, *arguments: Any, **options: Any) -> Any:
        return self._tracer.trace_transfer(
            "combine", lambda: self._buffer.combine(*arguments, **options)
        )


def start_tracing() -> Tracer:
    """Layers and buffers made from now on are traced; ends any earlier tracing. With CUDA, the
    current device is the rank's.
    """
    global _active
    _active = Tracer(DeviceClock() if torch.cuda.is_available() else HostClock())
    return _active


def stop_tracing() -> None:
    """Layers and buffers made from now on are not traced."""
    global _active
    _active = None


def active_tracer() -> Tracer | None:
    """The tracer of start_tracing()."""
    return _active


def computing(name: str) -> contextlib.AbstractContextManager[None]:
    """Around work of the experts that is none of their forwards or backwards."""
    return contextlib.nullcontext() if _active is None else _active.computing(name)


def hidden_fraction(spans: Sequence[Span]) -> float | None:
    """The part of the transfers' time during which experts of the same rank compute.

    Example: a transfer from 0 to 10 and experts from 4 to 20 -> 0.6. None without transfers.
    """
    busy = merge([(span.begin_ns, span.end_ns) for span in spans if span.track == EXPERTS])
    transfers = merge([(span.begin_ns, span.end_ns) for span in spans if span.track == TRANSFERS])
    total = sum(end - begin for begin, end in transfers)
    hidden = sum(
        max(0, min(end, busy_end) - max(begin, busy_begin))
        for begin, end in transfers
        for busy_begin, busy_end in busy
    )
    return hidden / total if total else None


def busy_ns(spans: Sequence[Span], track: str) -> int:
    """How long the track of a rank is not empty."""
    merged = merge([(span.begin_ns, span.end_ns) for span in spans if span.track == track])
    return sum(end - begin for begin, end in merged)


def merge(intervals: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
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
