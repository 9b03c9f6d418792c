"""The number of chunks where "auto" asks for a choice: as many as gain time, one if none do.

A layer runs in one piece at first. After a few forwards some are timed, ranks agree on the times,
and the choice is made once: the number with the least estimated time, if that is less than the time
in one piece by more than MIN_GAIN. So what a chunk costs is weighed against what it hides:

    pass       routing of the other chunks, d, (n - 1) * max(e, d + c), e, c
    d, c       transfers of a chunk: their share of the bytes, but no less than an empty call
    e          its experts: their share of the device's time, but no less than the host's time for
               their launches, which each chunk takes anew; twice as much in the backward

Example: d = c = 3 ms and e = 10 ms in one piece take 16 ms forward and 26 backward. If the host
takes 2 ms for the experts' launches, 4 chunks take 11.5 + 21.5 ms. If it takes 10 ms, 2 chunks take
23 + 43, and the layer stays in one piece.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_ep.trace_clocks import Clock, DeviceClock, HostClock

MAX_CHUNKS = 4

MIN_ROWS = 256
"""Rows that an expert should have in a chunk: a few tiles of a GEMM."""

MIN_GAIN = 0.05
"""Part of the time in one piece that chunks have to gain, since times are estimates."""

WARM_UP, TIMED = 3, 3
"""Forwards before any is timed, and forwards that are."""

_EXPERTS_OF_PASSES = (1, 2)
"""Work of the experts in forward and backward."""


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of a forward in one piece.

    Attributes:
        dispatch, experts, combine: on the device.
        host: of the host, for the launches of the experts; 0 where the host is the device.
        call: of a fresh dispatch without rows.
    """

    dispatch: float
    experts: float
    combine: float
    host: float
    call: float


def estimate(times: Times, num_chunks: int) -> float:
    """Seconds of forward and backward, by the table above."""
    total = (num_chunks - 1) * times.call
    for work in _EXPERTS_OF_PASSES:
        dispatch, combine = (
            max(whole / num_chunks, times.call) for whole in (times.dispatch, times.combine)
        )
        experts = work * max(times.experts / num_chunks, times.host)
        total += dispatch + (num_chunks - 1) * max(experts, dispatch + combine) + experts + combine
    return total


def choose(times: Times, *, rows_per_expert: int) -> int:
    """The number of chunks.

    Args:
        times: of the layer in one piece.
        rows_per_expert: of a micro-batch.
    """
    most = max(1, min(MAX_CHUNKS, rows_per_expert // MIN_ROWS))
    best = min(range(1, most + 1), key=lambda n: estimate(times, n))
    gains = estimate(times, best) < (1 - MIN_GAIN) * estimate(times, 1)
    return best if gains else 1


class StopWatch:
    """Takes no times; see ForwardWatch."""

    def begin(self) -> None:
        """The input is there."""

    def experts(self) -> contextlib.AbstractContextManager[None]:
        """Around the experts, whose rows are there."""
        return contextlib.nullcontext()

    def end(self) -> None:
        """The output is there."""


NO_WATCH = StopWatch()


class ForwardWatch(StopWatch):
    """Takes the times of a forward in one piece."""

    def __init__(self, clock: Clock, *, host_is_device: bool) -> None:
        self._clock, self._host_is_device = clock, host_is_device
        self._moments: list[Any] = []
        self._host_s = 0.0

    def begin(self) -> None:
        self._clock.start()
        self._moments.append(self._clock.now())

    @contextlib.contextmanager
    def experts(self) -> Iterator[None]:
        self._moments.append(self._clock.now())
        begin = time.perf_counter()
        yield
        self._host_s = time.perf_counter() - begin
        self._moments.append(self._clock.now())

    def end(self) -> None:
        self._moments.append(self._clock.now())

    def times(self, *, call: float) -> Times:
        """Waits for the forward, if it is under way."""
        moments = [self._clock.read(moment) * 1e-9 for moment in self._moments]
        dispatch, experts, combine = (b - a for a, b in zip(moments, moments[1:]))
        host = 0.0 if self._host_is_device else self._host_s
        return Times(dispatch=dispatch, experts=experts, combine=combine, host=host, call=call)


class Chooser:
    """Counts and times the forwards of a layer until the choice is made.

    Args:
        group: of the ranks, which all make the same calls and get the same number.
        device: of the rows.
        rows_per_expert: of a micro-batch on this rank.
        empty_call: makes a fresh dispatch without rows.
    """

    def __init__(
        self,
        *,
        group: Any,
        device: torch.device,
        rows_per_expert: int,
        empty_call: Callable[[], Any],
    ) -> None:
        self._group, self._device, self._rows_per_expert = group, device, rows_per_expert
        self._empty_call = empty_call
        self._num_forwards = 0
        self._watches: list[ForwardWatch] = []
        self.num_chunks: int | None = None

    def next_watch(self) -> StopWatch:
        """To be called before each forward; sets num_chunks once it is known."""
        self._num_forwards += 1
        if self._num_forwards <= WARM_UP:
            return NO_WATCH
        if len(self._watches) < TIMED:
            is_cuda = self._device.type == "cuda"
            watch = ForwardWatch(
                DeviceClock() if is_cuda else HostClock(), host_is_device=not is_cuda
            )
            self._watches.append(watch)
            return watch
        if self.num_chunks is None:
            times, rows = self._agree()
            self.num_chunks = choose(times, rows_per_expert=rows)
        return NO_WATCH

    def _agree(self) -> tuple[Times, int]:
        """The least times of each rank; over ranks, the transfers that waited least for others, and
        the slowest experts and hosts.
        """
        call = min(self._time_call() for _ in range(TIMED))
        timed = [watch.times(call=call) for watch in self._watches]
        least = {name: min(vars(one)[name] for one in timed) for name in vars(timed[0])}
        agreed = torch.tensor(
            [
                -least["dispatch"],
                -least["combine"],
                least["experts"],
                least["host"],
                call,
                -self._rows_per_expert,
            ],
            dtype=torch.float64,
            device=self._device,
        )
        torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX, group=self._group)
        dispatch, combine, experts, host, call, rows = agreed.tolist()
        times = Times(dispatch=-dispatch, combine=-combine, experts=experts, host=host, call=call)
        return times, int(-rows)

    def _time_call(self) -> float:
        begin = time.perf_counter()
        self._empty_call()
        return time.perf_counter() - begin
