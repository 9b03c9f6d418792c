"""Times of operations on GPUs: all ranks start together, with cold caches.

Before every call, outside of what is timed, each rank overwrites its L2 cache, waits for its device
and for all ranks, and starts at a moment that they have agreed on. Two clocks:

    events   CUDA events around the call. The stream sleeps first, so that the call is enqueued
             before it may start, and goes through a barrier of the devices: their time, without the
             launches and without the differences between the ranks' hosts
    host     from before the call until the device is idle: what a program that waits sees
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ep_kernels.bench.timing import Stats, start_together, summarise

SLEEP_CYCLES = 4_000_000
"""About two milliseconds: longer than the host takes to enqueue a call."""

MIN_SCRAP_BYTES = 128 << 20

Operation = Callable[[], Any]


class Clock(Protocol):
    """How a device's time is taken."""

    def settle(self) -> None:
        """Empties caches, and returns once the device is idle."""

    def time_events(self, op: Operation, align: Operation) -> float:
        """Seconds that the device spends on `op`, after `align`, a barrier on the devices."""

    def time_host(self, op: Operation, align: Operation) -> float:
        """Seconds until the device has finished `op`, on a host that has just done `align`."""


class CudaClock:
    """Of the current device and its current stream."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        num_bytes = max(MIN_SCRAP_BYTES, 3 * properties.L2_cache_size)
        self._scrap = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")

    def settle(self) -> None:
        self._scrap.zero_()
        torch.cuda.synchronize()

    def time_events(self, op: Operation, align: Operation) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SLEEP_CYCLES)
        align()
        begin.record()
        result = op()
        end.record()
        torch.cuda.synchronize()
        del result  # not earlier: freeing it is no part of the operation
        return begin.elapsed_time(end) * 1e-3

    def time_host(self, op: Operation, align: Operation) -> float:
        align()  # wakes host and device, as the call before does in a program
        torch.cuda.synchronize()
        begin = time.perf_counter_ns()
        result = op()
        torch.cuda.synchronize()
        duration = (time.perf_counter_ns() - begin) * 1e-9
        del result
        return duration


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds by either clock, over the iterations, each that of the slowest rank."""

    events: Stats
    host: Stats


@dataclass(frozen=True, kw_only=True)
class Stopwatch:
    """Times operations on all ranks.

    Attributes:
        clock: of this rank's device.
        barrier: returns when every rank has called it and its device is idle.
        align: enqueues a barrier of the ranks' devices.
        num_iterations, num_warmup: calls by either clock, timed and not.
    """

    clock: Clock
    barrier: Callable[[], None]
    align: Operation
    num_iterations: int
    num_warmup: int

    def time(self, op: Operation) -> Timing:
        """Collective; every rank gets the same answer."""
        durations: dict[str, list[float]] = {"events": [], "host": []}
        for iteration in range(-self.num_warmup, self.num_iterations):
            for name in durations:
                self.clock.settle()
                self.barrier()
                start_together()
                if name == "events":
                    seconds = self.clock.time_events(op, self.align)
                else:
                    seconds = self.clock.time_host(op, self.align)
                if iteration >= 0:
                    durations[name].append(seconds)
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, durations)
        return Timing(**{name: summarise([each[name] for each in gathered]) for name in durations})
