"""The low-latency region of a CPU rank, and the compiled calls over it."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch

from ep_kernels import _native
from ep_kernels._native_ll import (
    RECEIVE_ASYNC,
    LlCombineArgs,
    LlDispatchArgs,
    ll_library,
)
from ep_kernels.errors import EPConfigError
from ep_kernels.event import Event

if TYPE_CHECKING:
    from ep_kernels.cpu_backend import CpuBackend


class CpuLowLatency:
    """One rank's low-latency region: the first range of its pool.

    Raises:
        EPConfigError: num_bytes is too small for the words that ranks share.
    """

    def __init__(self, backend: CpuBackend, num_bytes: int, *, mask_silent_ranks: bool) -> None:
        self._library = ll_library()
        self._make_event, self._view = backend.make_event, backend.view
        self._low_latency: int | None = None
        self._region = backend.reserve((num_bytes,), torch.uint8).tensor()
        offset = backend.pool_offset(self._region)
        assert offset == 0, "the region must be at the same place on all ranks"
        out = ctypes.c_void_p()
        _native.call(
            self._library.ep_ll_create,
            backend.core,
            offset,
            num_bytes,
            mask_silent_ranks,
            ctypes.byref(out),
        )
        self._low_latency = out.value
        backend.when_destroyed(self._delete)

    def choose_num_sms(self, wanted: int | None, *, default: int) -> int:
        """Worker threads of a call."""
        return wanted or default

    def view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor over the pool, in the region or in a window that replaced a half of it."""
        return self._view(offset, shape, dtype, keep=self._region)

    def dispatch(
        self, args: LlDispatchArgs, receive: int, *, keep: Any
    ) -> tuple[int, int, Event | None]:
        """Number of the call, window of its rows, and the event of an asynchronous call."""
        number, window = ctypes.c_uint64(), ctypes.c_int64()
        op = ctypes.c_void_p()
        _native.call(
            self._library.ep_ll_dispatch,
            self._core(),
            ctypes.byref(args),
            receive,
            ctypes.byref(number),
            ctypes.byref(window),
            ctypes.byref(op),
        )
        return number.value, window.value, self._event(op, receive, keep)

    def combine(self, args: LlCombineArgs, receive: int, *, keep: Any) -> tuple[int, Event | None]:
        """Number of the call, and the event of an asynchronous call."""
        number, op = ctypes.c_uint64(), ctypes.c_void_p()
        _native.call(
            self._library.ep_ll_combine,
            self._core(),
            ctypes.byref(args),
            receive,
            ctypes.byref(number),
            ctypes.byref(op),
        )
        return number.value, self._event(op, receive, keep)

    def receive(self, number: int, *, keep: Any) -> None:
        _native.call(self._library.ep_ll_receive, self._core(), number)

    def release(self, dispatch: int) -> None:
        """The handle is gone. Does nothing after destroy()."""
        if self._low_latency is not None:
            self._library.ep_ll_release(self._low_latency, dispatch)

    def barrier(self) -> None:
        _native.call(self._library.ep_ll_barrier, self._core())

    def refuse(self, reason: str) -> None:
        _native.call(self._library.ep_ll_refuse, self._core(), reason.encode())

    def mask(self, rank: int) -> None:
        _native.call(self._library.ep_ll_mask, self._core(), rank)

    def unmask(self, rank: int) -> None:
        """Takes a rank back; all masked ones for -1."""
        _native.call(self._library.ep_ll_unmask, self._core(), rank)

    def query_mask(self, num_ranks: int) -> torch.Tensor:
        mask = torch.zeros(num_ranks, dtype=torch.bool)
        _native.call(self._library.ep_ll_query_mask, self._core(), mask.data_ptr())
        return mask

    def _delete(self) -> None:
        low_latency, self._low_latency = self._low_latency, None
        self._library.ep_ll_delete(low_latency)

    def _core(self) -> int:
        if self._low_latency is None:
            raise EPConfigError("this buffer was destroyed and cannot be used any more")
        return self._low_latency

    def _event(self, op: ctypes.c_void_p, receive: int, keep: Any) -> Event | None:
        return self._make_event(op, keep) if receive == RECEIVE_ASYNC else None
