"""What HighThroughput needs of a backend; CpuBackend and CudaBackend have it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ep_kernels.errors import EPError

if TYPE_CHECKING:
    import torch

    from ep_kernels._native import CombineArgs, DispatchArgs
    from ep_kernels.bootstrap import Bootstrap
    from ep_kernels.event import Event
    from ep_kernels.handle import HostCounts, RoutingMemory
    from ep_kernels.lanes import ScaleoutStats
    from ep_kernels.pool import Received, ReceiveFormat, Reservation


@dataclass(frozen=True, kw_only=True)
class CallOptions:
    """How a call runs, and what it counts; see Buffer.dispatch()."""

    async_op: bool
    previous_event: Event | None
    num_sms: int | None
    cumulative_recv_stats: torch.Tensor | None = None
    wait_recv_cost_stats: torch.Tensor | None = None


def wait_for_previous(options: CallOptions, refuse: Callable[[str], None]) -> None:
    """Blocks the host; for events of other buffers, since calls of one run in order anyway. If that
    call failed, this one is not made, and `refuse` tells the peers so.

    Raises:
        EPError: that call's.
    """
    if options.previous_event is None:
        return
    try:
        options.previous_event.wait()
    except EPError as error:
        with contextlib.suppress(EPError):  # of a buffer that has failed itself
            refuse(f"previous_event: {error}")
        raise


@dataclass(frozen=True, kw_only=True)
class FreshDispatch:
    """A dispatch under way: its number, what the host knows of it, its memory, its end."""

    seq: int
    host: HostCounts
    received: Received
    event: Event


class Backend(Protocol):
    """One rank's memory and transfers on one kind of device.

    Methods that make a call are collective. They raise EPConfigError, EPDeviceError and
    EPTimeoutError. `memory` is the routing of the call, which a fresh dispatch fills. `keep` is
    kept alive until the call is through.
    """

    device: torch.device
    chains_rows: bool
    """Whether EXPERT_MAJOR results need chain words, see `csrc/core/routing.h`."""

    def choose_num_sms(self, bootstrap: Bootstrap, wanted: int | None) -> int:
        """Worker threads or SMs of this rank's transfers, if it does not say which it wants.
        Collective, before any call.
        """

    def reserve(self, shape: tuple[int, ...], dtype: torch.dtype) -> Reservation:
        """Memory of this rank's pool for a tensor. Raises EPDeviceError if the pool is full."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in this rank's pool, for the caller to write to."""

    def memory_pool(self) -> AbstractContextManager[None]:
        """Has torch allocate from the pool on this thread, where it can."""

    def empty_words(self, num_words: int, *, options: CallOptions) -> torch.Tensor:
        """[num_words] int64 for a routing: uninitialised, and used by nobody before this call."""

    def pool_offset(self, tensor: torch.Tensor) -> int | None:
        """Offset of a contiguous tensor in the pool, None if it lies elsewhere."""

    def pool_stats(self) -> dict[str, int]:
        """Ranges in use, bytes in use, most bytes that were in use."""

    def scaleout_stats(self) -> ScaleoutStats:
        """Bytes exchanged with other nodes."""

    def count_rows(self, topk_idx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows for each rank, then tokens for each expert [R + E] int32; [T, R] bool."""

    def poll(self) -> None:
        """Before a call: lets go of what finished calls kept. If one of them has made the buffer
        fail, this or the call raises why; other errors are their events' to raise.
        """

    def dispatch_fresh(
        self,
        args: DispatchArgs,
        memory: RoutingMemory,
        *,
        formats: Callable[[], ReceiveFormat],
        keep: Any,
        options: CallOptions,
    ) -> FreshDispatch:
        """A dispatch whose memory is taken when the counts are known; fills the routing. `formats`
        is asked as late as possible: peers wait for what comes before.

        Raises EPDeviceError, on all ranks, if one of them has no memory for its rows.
        """

    def dispatch(
        self, args: DispatchArgs, memory: RoutingMemory, *, keep: Any, options: CallOptions
    ) -> tuple[int, Event]:
        """A dispatch whose memory is known: with a capacity or a cached handle."""

    def combine(
        self, args: CombineArgs, memory: RoutingMemory, *, keep: Any, options: CallOptions
    ) -> Event:
        """Sums rows."""

    def barrier(self) -> None:
        """Waits for all ranks, on the host."""

    def refuse(self, reason: str) -> None:
        """Takes part in a call that this rank rejects."""

    def destroy(self) -> None:
        """Leaves the group. Idempotent."""
