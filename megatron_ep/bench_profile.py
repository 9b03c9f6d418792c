"""Where the host's time goes in a pass of a layer, and whether the device waits for it.

    host                how long the call of the pass takes: the device may have work left
    pass                until that work is done, too
    parts of host       fresh dispatches, which wait for counts; other calls of the buffer; waiting
                        for their ends (which no host does on GPUs); the experts; the rest: router,
                        autograd, sums of gradients
    device busy         when any kernel or copy runs on the device, for this rank's process
    ops, launches       operators of ATen; kernels and copies that were given to the device
    waits               calls of the CUDA runtime that wait for the device

A pass whose host time is close to its whole time, with a device that is busy for a part of it, is
bound by the host. What a chunk adds to the host's time is what it has to hide to be worth while.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from megatron_ep.trace import merge

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
LAUNCHES = ("LaunchKernel", "cudaMemcpyAsync", "cudaMemsetAsync")

PARTS = ("fresh dispatch", "transfers", "events", "experts forward", "experts backward")


@dataclass
class HostTimes:
    """Seconds of the host, and number of times, by part."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    calls: Counter[str] = field(default_factory=Counter)

    def add(self, part: str, begin: float) -> None:
        self.seconds[part] += time.perf_counter() - begin
        self.calls[part] += 1

    def call(self, part: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            self.add(part, begin)


@dataclass(frozen=True)
class _TimedEvent:
    """An event whose waits are timed."""

    event: Any
    times: HostTimes

    def current_stream_wait(self) -> None:
        self.times.call("events", self.event.current_stream_wait)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.event, name)


class TimedBuffer:
    """A buffer whose calls are timed on the host."""

    def __init__(self, buffer: Any, times: HostTimes) -> None:
        self._buffer, self._times = buffer, times

    def __getattr__(self, name: str) -> Any:
        return getattr(self._buffer, name)

    def dispatch(self, *arguments: Any, **options: Any) -> Any:
        part = "fresh dispatch" if options.get("handle") is None else "transfers"
        return self._timed(part, self._buffer.dispatch, arguments, options)

    def combine(self, *arguments: Any, **options: Any) -> Any:
        return self._timed("transfers", self._buffer.combine, arguments, options)

    def _timed(self, part: str, call: Any, arguments: Any, options: Any) -> Any:
        result = self._times.call(part, call, *arguments, **options)
        return replace(result, event=_TimedEvent(result.event, self._times))


@contextlib.contextmanager
def timing_host(layer: Any, device: torch.device) -> Iterator[HostTimes]:
    """Times the layer's parts on the host inside of the block."""
    times = HostTimes()
    begins: list[float] = []
    dispatcher = layer.token_dispatcher
    buffer = TimedBuffer(dispatcher.buffer(device), times)

    def begin(*_: Any) -> None:
        begins.append(time.perf_counter())

    def end(part: str) -> Callable[..., None]:
        return lambda *_: times.add(part, begins.pop())

    hooks = [
        layer.experts.register_forward_pre_hook(begin),
        layer.experts.register_forward_hook(end("experts forward")),
        layer.experts.register_full_backward_pre_hook(begin),
        layer.experts.register_full_backward_hook(end("experts backward")),
    ]
    dispatcher.buffer = lambda _: buffer
    try:
        yield times
    finally:
        del dispatcher.buffer
        for hook in hooks:
            hook.remove()


def profile_pass(
    op: Callable[[], Any], layer: Any, device: torch.device, *, iterations: int
) -> dict[str, Any]:
    """The table above for one pass, in milliseconds; means of `iterations` on this rank."""
    host = whole = 0.0
    with timing_host(layer, device) as times:
        for _ in range(iterations):
            _synchronize(device)
            torch.distributed.barrier()
            begin = time.perf_counter()
            op()
            host += time.perf_counter() - begin
            _synchronize(device)
            whole += time.perf_counter() - begin
    parts = times.seconds | {"rest": host - sum(times.seconds.values())}
    scale = 1e3 / iterations
    return {
        "host_ms": host * scale,
        "pass_ms": whole * scale,
        **{f"{name.replace(' ', '_')}_ms": seconds * scale for name, seconds in parts.items()},
        "expert_calls": times.calls["experts forward"] // iterations,
        **count_events(op, device),
    }


def count_events(op: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Of one pass under torch's profiler, which itself costs the host time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    torch.distributed.barrier()
    with torch.profiler.profile(activities=activities) as profiler:
        op()
        _synchronize(device)
    events = list(profiler.events() or [])
    names = [event.name for event in events]
    counts: dict[str, Any] = {"ops": sum(name.startswith("aten::") for name in names)}
    if device.type != "cuda":
        return counts
    on_device = [
        event for event in events if event.device_type is not torch.autograd.DeviceType.CPU
    ]
    spans = merge([(event.time_range.start, event.time_range.end) for event in on_device])
    return counts | {
        "launches": sum(any(part in name for part in LAUNCHES) for name in names),
        "waits": sum(name in WAITS for name in names),
        "device_busy_ms": sum(end - begin for begin, end in spans) / 1e3,
    }


def per_chunk(whole: dict[str, Any], chunked: dict[str, Any]) -> dict[str, float]:
    """What a chunk more adds, from a layer in one piece and one in chunks; in their units."""
    added = chunked["expert_calls"] - whole["expert_calls"]
    return {
        name: (chunked[name] - value) / added
        for name, value in whole.items()
        if name != "expert_calls" and added > 0
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
