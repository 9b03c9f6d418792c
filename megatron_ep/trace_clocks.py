"""When something happens on a rank: moments that are taken as it goes and read afterwards.

On the CPU a moment is a time. On a GPU it is an event on a stream, whose time is known when the
device has come to it; taking it makes nobody wait, so that a traced run overlaps as any other.

Times are nanoseconds of time.monotonic_ns(), which the ranks of a machine share.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Where moments come from."""

    def start(self) -> None:
        """To be called before the first moment, and now and then, which keeps times precise."""

    def now(self) -> Any:
        """The moment when all work given so far (to the current stream) is done."""

    def after(self, event: Any) -> Any:
        """The moment when a call of a buffer is over; None if its event has the times."""

    def read(self, moment: Any) -> int:
        """The time of a moment; waits for it."""


class HostClock:
    """Of ranks on the CPU, where work is done when it is given."""

    def start(self) -> None:
        pass

    def now(self) -> int:
        return time.monotonic_ns()

    def after(self, event: Any) -> None:
        return None

    def read(self, moment: int) -> int:
        return moment


@dataclass(frozen=True)
class _Origin:
    """An event, and its time as seen by the host, some microseconds late."""

    event: torch.cuda.Event
    time_ns: int


@dataclass(frozen=True)
class _Moment:
    """An event, to be read relative to an origin."""

    origin: _Origin
    event: torch.cuda.Event


class DeviceClock:
    """Of ranks on the current GPU."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self.start()

    def start(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        event.record()
        event.synchronize()
        self._origin = _Origin(event, time.monotonic_ns())

    def now(self) -> _Moment:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return _Moment(self._origin, event)

    def after(self, event: Any) -> _Moment:
        """A call runs on the buffer's own stream: a stream that waits for it tells when it ends."""
        with torch.cuda.stream(self._stream):
            event.current_stream_wait()
            return self.now()

    def read(self, moment: _Moment) -> int:
        moment.event.synchronize()
        elapsed_ms = moment.origin.event.elapsed_time(moment.event)
        return moment.origin.time_ns + round(elapsed_ms * 1e6)
