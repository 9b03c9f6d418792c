"""Completion of asynchronous calls, with the same meaning on the CPU and on GPUs."""

from __future__ import annotations

from typing import Protocol


class Operation(Protocol):
    """What a backend hands out for a call under way."""

    def is_finished(self) -> bool: ...

    def wait(self) -> None:
        """Blocks the host until the call has finished; raises its error."""

    def make_current_stream_wait(self) -> None:
        """Orders later work of the current stream behind the call."""

    def interval(self) -> tuple[int, int] | None:
        """When the finished call ran; None if the backend does not know."""


class Event:
    """The end of one dispatch or combine.

    Results of a call made with `async_op=True` may be used after `wait()`, or after
    `current_stream_wait()` by work submitted to the current stream later. Once `query()` is true,
    `wait()` returns at once, or raises: a call that failed has no results. As a context manager it
    makes the current stream wait on exit, so that work inside the block overlaps the transfer.

    An event made without an operation is complete.
    """

    def __init__(self, operation: Operation | None = None) -> None:
        self._operation = operation
        self._interval: tuple[int, int] | None = None

    @property
    def operation(self) -> Operation | None:
        """The call behind the event; None once it is known to be complete."""
        return self._operation

    def wait(self) -> None:
        """Blocks the host until the call has finished.

        Raises:
            EPError: the error of the call, each time.
        """
        if self._operation is not None:
            self._operation.wait()
            self._interval = self._operation.interval()
            self._operation = None

    def current_stream_wait(self) -> None:
        """Makes the current stream wait; on the CPU, where calls and streams are one, the host."""
        if self._operation is not None:
            self._operation.make_current_stream_wait()

    def query(self) -> bool:
        """Whether the call has finished, with or without an error."""
        return self._operation is None or self._operation.is_finished()

    def interval(self) -> tuple[int, int] | None:
        """Waits for the call, then tells when its transfer ran.

        Returns:
            Begin and end in nanoseconds of time.monotonic_ns(); None for a call made without
            `async_op`, which ran while it was called, and on GPUs.

        Raises:
            EPError: the error of the call.
        """
        self.wait()
        return self._interval

    def __enter__(self) -> Event:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.current_stream_wait()
