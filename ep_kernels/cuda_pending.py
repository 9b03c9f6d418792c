"""Calls on a GPU that are under way, and what they use until they are over."""

from __future__ import annotations

from typing import Any, Protocol


class Calls(Protocol):
    """Who makes calls on a GPU and knows them by number."""

    def is_finished(self, number: int) -> bool: ...
    def wait(self, number: int) -> None: ...
    def make_current_stream_wait(self, number: int) -> None: ...


class CallOnDevice:
    """What the event of a call asks."""

    def __init__(self, calls: Calls, number: int) -> None:
        self._calls, self.number = calls, number

    def is_finished(self) -> bool:
        return self._calls.is_finished(self.number)

    def wait(self) -> None:
        self._calls.wait(self.number)

    def make_current_stream_wait(self) -> None:
        self._calls.make_current_stream_wait(self.number)

    def interval(self) -> None:
        return None


class PendingCalls:
    """In the order in which the calls were made.

    Attributes:
        stream_of_dying: while drop() lets go of things, the stream from which the call that used
            them was made: their last user beside the call had let go of them before, on that
            stream as a rule. None at other times.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[int, Any, int]] = []
        self.stream_of_dying: int | None = None

    def add(self, number: int, keep: Any, stream: int) -> None:
        self._calls.append((number, keep, stream))

    def oldest(self) -> int | None:
        """The number of the oldest call."""
        return self._calls[0][0] if self._calls else None

    def numbers(self) -> list[int]:
        return [number for number, _, _ in self._calls]

    def drop(self, number: int) -> None:
        """Lets go of what a call used; nothing if it is not here."""
        for index, known in enumerate(self.numbers()):
            if known == number:
                _, keep, self.stream_of_dying = self._calls.pop(index)
                del keep
                self.stream_of_dying = None
                return

    def clear(self) -> None:
        self._calls.clear()
