"""Streams of a device, and moments of them. Tests have others, without a GPU."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from ep_kernels.errors import EPDeviceError

if TYPE_CHECKING:
    import torch


class Moment(Protocol):
    """A point in a stream's work."""

    def synchronize(self) -> None:
        """Blocks the host until the work before it is done. Raises EPDeviceError."""


class Stream(Protocol):
    """Work in order. Its work never waits for another process."""

    def record(self) -> Moment:
        """After what the stream has been given by now."""

    def wait(self, moment: Moment) -> None:
        """What the stream is given from now on comes after a moment of this or another stream."""

    def copy(self, to: torch.Tensor, of: torch.Tensor) -> None:
        """Between device and pinned host memory, without waiting."""

    def host_memory(self, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8 that copies to and from the device need not wait for."""

    def synchronize(self) -> None:
        """Blocks the host until all work is done. Raises EPDeviceError."""


class _CudaMoment:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        import torch

        self.event = torch.cuda.Event()
        self.event.record(stream)

    def synchronize(self) -> None:
        with device_errors():
            self.event.synchronize()


class CudaStream:
    """A stream of its own, or one that torch has.

    Attributes:
        raw: the stream as torch knows it.
    """

    def __init__(self, device: torch.device, raw: torch.cuda.Stream | None = None) -> None:
        import torch

        # Few blocks that peers wait for go before the many of a GEMM.
        with device_errors():
            self.raw = torch.cuda.Stream(device, priority=-1) if raw is None else raw

    def record(self) -> Moment:
        return _CudaMoment(self.raw)

    def wait(self, moment: Moment) -> None:
        assert isinstance(moment, _CudaMoment)
        self.raw.wait_event(moment.event)

    def copy(self, to: torch.Tensor, of: torch.Tensor) -> None:
        import torch

        with torch.cuda.stream(self.raw):
            to.copy_(of, non_blocking=True)

    def host_memory(self, num_bytes: int) -> torch.Tensor:
        import torch

        with torch.cuda.device(self.raw.device):  # threads begin with another one
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def synchronize(self) -> None:
        with device_errors():
            self.raw.synchronize()


@contextlib.contextmanager
def device_errors() -> Iterator[None]:
    """Errors of the device as EPDeviceError."""
    try:
        yield
    except RuntimeError as error:
        raise EPDeviceError(f"the device reports an error: {error}") from None


def wait_until(is_over: Callable[[], bool], timeout_s: float) -> bool:
    """Polls on the host; False if the time has run out."""
    deadline = time.monotonic() + timeout_s
    while not is_over():
        if time.monotonic() > deadline:
            return False
        time.sleep(20e-6)
    return True
