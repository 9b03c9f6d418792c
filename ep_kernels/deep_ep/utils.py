"""Events in DeepEP's terms. Calls of ep_kernels end in an ep_kernels.Event; an EventHandle is such
an end, or a point that the current stream has reached.
"""

from __future__ import annotations

from typing import Any

import torch

from ep_kernels.event import Event


class EventHandle:
    """Work that was submitted before a point; without an argument all of the current stream's.

    On the CPU, where work is done when it was submitted, such a point lies in the past.

    Args:
        event: the end of a call.
    """

    def __init__(self, event: Event | None = None) -> None:
        self.call = event
        self._point: torch.cuda.Event | None = None
        if event is None and torch.cuda.is_initialized():
            self._point = torch.cuda.Event()
            self._point.record()

    def current_stream_wait(self) -> None:
        """Orders later work of the current stream behind the point; on the CPU the host waits.

        Raises:
            EPError: the call has failed (CPU).
        """
        if self.call is not None:
            self.call.current_stream_wait()
        elif self._point is not None:
            self._point.wait()


class EventOverlap:
    """An EventHandle as a context: work inside the block overlaps the transfer, work behind it
    comes after.

    Args:
        event: None for something that is over.
        extra_tensors: kept alive as long as this object.
    """

    def __init__(
        self,
        event: EventHandle | None = None,
        extra_tensors: tuple[torch.Tensor, ...] | None = None,
    ) -> None:
        self.event = event
        self.extra_tensors = extra_tensors

    def current_stream_wait(self) -> None:
        """Orders later work of the current stream behind the event."""
        if self.event is not None:
            self.event.current_stream_wait()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.current_stream_wait()
