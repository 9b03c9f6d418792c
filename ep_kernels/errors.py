"""Exceptions of ep_kernels. Every error that the package raises on purpose is an `EPError`."""

from __future__ import annotations

from typing import Any


class EPError(Exception):
    """Base class: catch this to catch all of them."""


class EPConfigError(EPError, ValueError):
    """An argument is wrong or ranks disagree; nothing was sent and the buffer stays usable.

    The message names the argument (or field) and its value, and the rank when a peer is at fault.
    """


class EPTimeoutError(EPError, TimeoutError):
    """A peer died or stayed silent; the buffer has failed and refuses further use.

    Attributes:
        rank: the rank that waited.
        phase: what it was doing, such as "notify" or "dispatch".
        peer: the rank that it waited for.
        expected: the value of the shared word that would have ended the wait.
        seen: the value that the word had when the wait was given up.
    """

    def __init__(
        self,
        message: str,
        *,
        rank: int | None = None,
        phase: str | None = None,
        peer: int | None = None,
        expected: int | None = None,
        seen: int | None = None,
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.phase = phase
        self.peer = peer
        self.expected = expected
        self.seen = seen

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_timeout_error, (type(self), str(self), dict(self.__dict__))


class EPDeviceError(EPError, RuntimeError):
    """The device (or the memory shared between ranks) could not do what was asked."""


def _rebuild_timeout_error(
    cls: type[EPTimeoutError], message: str, fields: dict[str, Any]
) -> EPTimeoutError:
    """Unpickles: OSError's own scheme passes positional arguments only and loses the fields."""
    error = cls(message)
    error.__dict__.update(fields)
    return error
