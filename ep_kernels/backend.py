"""What HighThroughput needs of a backend; CpuBackend and CudaBackend have it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import torch

    from ep_kernels._native import CombineArgs, DispatchArgs
    from ep_kernels.event import Event
    from ep_kernels.handle import DispatchHandle, HostCounts


class Backend(Protocol):
    """One rank's memory and transfers on one kind of device.

    Methods that make a call are collective and, but for barrier() and refuse(), used inside
    `with call(...)`. They raise EPConfigError, EPDeviceError and EPTimeoutError.
    """

    device: torch.device

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in this rank's pool. Raises EPDeviceError if the pool is full."""

    def pool_offset(self, tensor: torch.Tensor) -> int | None:
        """Offset of a contiguous tensor in the pool, None if it lies elsewhere."""

    def pool_stats(self) -> dict[str, int]:
        """Ranges in use, bytes in use, most bytes that were in use."""

    def count_rows(self, topk_idx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows for each rank, then tokens for each expert [R + E] int32; [T, R] bool."""

    def call(self, previous_event: Event | None) -> AbstractContextManager[None]:
        """Orders the call inside behind the current stream, or behind `previous_event`."""

    def notify(self, args: DispatchArgs, handle: DispatchHandle) -> tuple[int, HostCounts]:
        """First half of a fresh dispatch: fills the handle's routing; number of the call."""

    def send(self, seq: int, args: DispatchArgs, *, keep: Any, error: str, async_op: bool) -> Event:
        """Second half. `error` says why this rank has no memory for its rows, or is empty."""

    def dispatch(self, args: DispatchArgs, *, keep: Any, async_op: bool) -> tuple[int, Event]:
        """A dispatch whose memory is known: with a capacity or a cached handle."""

    def combine(self, args: CombineArgs, *, keep: Any, async_op: bool) -> Event:
        """Sums rows; `keep` lives until the call is through."""

    def barrier(self) -> None:
        """Waits for all ranks, on the host."""

    def refuse(self, reason: str) -> None:
        """Takes part in a call that this rank rejects."""

    def destroy(self) -> None:
        """Leaves the group. Idempotent."""
