"""Runs the calls of one buffer one after the other, in the order of submission: the Python twin of
`csrc/runtime/op_queue.h`, for calls whose steps are ordered in Python."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable


class QueuedCall:
    """A call on its way: runs once, then holds its error, if any."""

    def __init__(self, body: Callable[[], None]) -> None:
        self._body: Callable[[], None] | None = body
        self._error: Exception | None = None
        self._finished = threading.Event()
        self._interval = (0, 0)

    def run(self) -> None:
        assert self._body is not None
        begin_ns = time.monotonic_ns()
        try:
            self._body()
        except Exception as error:
            self._error = error.with_traceback(None)  # which would keep the call's tensors alive
        finally:
            self._body = None
            self._interval = begin_ns, time.monotonic_ns()
            self._finished.set()

    def is_finished(self) -> bool:
        return self._finished.is_set()

    def wait(self) -> None:
        """Blocks until it has finished; raises its error, each time."""
        self._finished.wait()
        if self._error is not None:
            raise self._error.with_traceback(None)

    make_current_stream_wait = wait

    def interval(self) -> tuple[int, int]:
        """When it ran, in nanoseconds of time.monotonic_ns(); only after it has finished."""
        return self._interval


class CallQueue:
    """A call that nobody has to wait behind runs on the caller's thread; the others on a thread of
    the queue, which starts when it is first needed and ends when there is nothing left to do."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[QueuedCall] = deque()
        self._is_busy = False  # a call runs, on whichever thread

    def run(self, body: Callable[[], None]) -> None:
        """Runs `body` after all before it; raises its error."""
        call = QueuedCall(body)
        with self._changed:
            is_next = not self._is_busy
            self._is_busy = True
            if not is_next:
                self._waiting.append(call)
        if is_next:
            try:
                call.run()
            finally:
                self._go_on()
        call.wait()

    def submit(self, body: Callable[[], None]) -> QueuedCall:
        """Returns at once; `body` runs after all before it."""
        call = QueuedCall(body)
        with self._changed:
            self._waiting.append(call)
            if self._is_busy:
                return call
            self._is_busy = True
        self._go_on()
        return call

    def drain(self) -> None:
        """Waits until everything submitted has finished."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_busy)

    def _go_on(self) -> None:
        """Hands the queue, which is marked busy, to a thread if calls wait."""
        with self._changed:
            if not self._waiting:
                self._is_busy = False
                self._changed.notify_all()
                return
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    self._is_busy = False
                    self._changed.notify_all()
                    return
                call = self._waiting.popleft()
            call.run()
            del call
